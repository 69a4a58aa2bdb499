"""Write tests/goldens: what diffusers computes, for the tests that run without it.

    python -m scripts.make_goldens

Needs torch and diffusers (the parity extra). The parity tests compute the same cases live, the
ordinary tests compare our code with the files. Each file records the versions that made it.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import pathlib
import platform
import sys
import zlib
from typing import Any

import numpy as np

from models.common.sampler import Sampler
from models.wan.config import WanConfig
from models.wan.params import sources
from scripts._mmdit_goldens import MMDIT, mmdit_golden

GOLDENS = pathlib.Path(__file__).parent.parent / "tests" / "goldens"

SAMPLERS = tuple(
    Sampler(steps=steps, shift=shift, solver=solver)
    for solver in ("euler", "unipc")
    for steps, shift in ((1, 1.0), (2, 3.0), (3, 1.0), (5, 12.0), (20, 5.0), (50, 3.0))
)
NOISE = np.random.RandomState(0).standard_normal((2, 3, 4)).astype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WanCase:
    """A tiny Wan with random weights.

    Attributes:
      config: its size.
      token_times: a timestep for each token, not for each video.
      norm_centre: mean of the norms' weights. At 0, as all other parameters, q and k are near zero,
        attention is almost uniform and positions hardly matter; at 1 they do.
    """

    config: WanConfig
    token_times: bool = False
    norm_centre: float = 0.0


_T2V = WanConfig(
    width=48,
    heads=3,  # of 16 channels: t, h, w take 8, 4, 4
    layers=2,
    ffn_width=64,
    in_channels=4,
    out_channels=4,
    text_width=16,
)
_I2V = dataclasses.replace(_T2V, in_channels=9, image_width=24)
WAN = {
    f"{name}-norms-{centre}": WanCase(config=config, token_times=times, norm_centre=centre)
    for name, config, times in (("t2v", _T2V, False), ("i2v", _I2V, False), ("ti2v", _T2V, True))
    for centre in (0, 1)
}
VIDEO_SIZE = (3, 4, 8)  # (T, H, W): another number of tokens along each axis
TEXT_TOKENS = 512  # where there is an image, diffusers takes the last 512 tokens for the text
WAN_TOLERANCE = 2e-5  # absolute, float32


def field(x: Any, sigma: Any, xp: Any) -> Any:
    """A smooth, nonlinear velocity, elementwise, in the array library `xp`."""
    return 0.8 * xp.sin(1.7 * x + sigma) + 0.5 * xp.cos(3 * sigma) * x - 0.3


def sampler_key(sampler: Sampler) -> str:
    """The name of a sampler's trajectory in the file."""
    return f"{sampler.solver}-{sampler.steps}-{sampler.shift:g}"


def diffusers_scheduler(sampler: Sampler) -> Any:
    """The scheduler of a published pipeline with this solver, its timesteps set."""
    import diffusers

    if sampler.solver == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=sampler.shift,
            solver_order=2,
            solver_type="bh2",
        )
        scheduler.set_timesteps(sampler.steps)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=sampler.shift)
        # The grid that diffusers' video pipelines pass; see `models.common.sampler.sigmas`.
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, sampler.steps + 1)[:-1])
    scheduler.set_begin_index(0)
    return scheduler


def diffusers_trajectory(sampler: Sampler) -> np.ndarray:
    """The x of every step and the last one, `[steps + 1, *NOISE.shape]`."""
    import torch

    scheduler = diffusers_scheduler(sampler)
    seen = [NOISE]
    for sigma, t in zip(scheduler.sigmas[:-1].numpy(), scheduler.timesteps, strict=True):
        v = field(seen[-1], sigma, np)
        step = scheduler.step(torch.from_numpy(v), t, torch.from_numpy(seen[-1]))
        seen.append(step.prev_sample.numpy())
    return np.stack(seen)


def wan_inputs(case: WanCase) -> dict[str, np.ndarray]:
    """The arguments of the model in our layout: x, t, text and, for some, image."""
    config, random = case.config, np.random.RandomState(1)
    inputs = {
        "x": random.standard_normal((2, *VIDEO_SIZE, config.in_channels)),
        "text": random.standard_normal((2, TEXT_TOKENS, config.text_width)),
        "t": np.array([250.0, 999.0]),
    }
    if case.token_times:
        inputs["t"] = random.randint(0, 1000, (2, math.prod(config.grid(VIDEO_SIZE))))
    if config.image_width is not None:
        inputs["image"] = random.standard_normal((2, 5, config.image_width))
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def wan_weight(case: WanCase, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name in diffusers' layout: N(0, 0.1), norms around their centre."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    centre = case.norm_centre if "norm" in name and name.endswith(".weight") else 0.0
    return (centre + 0.1 * normal).astype(np.float32)


def diffusers_wan(case: WanCase) -> Any:
    """diffusers' model with `wan_weight`s."""
    import diffusers
    import torch

    config = case.config
    model = diffusers.WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_width,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_width,
        freq_dim=config.time_width,
        ffn_dim=config.ffn_width,
        num_layers=config.layers,
        eps=config.eps,
        image_dim=config.image_width,
        added_kv_proj_dim=None if config.image_width is None else config.width,
    )
    weights = {
        name: torch.from_numpy(wan_weight(case, name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(weights, strict=True)
    return model.eval()


def diffusers_wan_output(case: WanCase) -> np.ndarray:
    """What diffusers computes for `wan_inputs`, `[2, *VIDEO_SIZE, out_channels]`."""
    import torch

    inputs = {name: torch.from_numpy(value) for name, value in wan_inputs(case).items()}
    with torch.no_grad():
        (out,) = diffusers_wan(case)(
            hidden_states=inputs["x"].movedim(-1, 1),
            timestep=inputs["t"],
            encoder_hidden_states=inputs["text"],
            encoder_hidden_states_image=inputs.get("image"),
            return_dict=False,
        )
    return out.movedim(1, -1).numpy()


def original_names(case: WanCase) -> dict[str, str]:
    """Tensor names of the original layout -> diffusers', by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    ours = [
        name
        for source in sources(case.config, "original").values()
        for name in source.names(case.config.layers)
    ]
    # The converter renames keys and passes tensors through, so a name can stand for its tensor.
    renamed = convert_wan_transformer_to_diffusers({name: name for name in ours})
    return {name: key for key, name in renamed.items()}


def wan_golden(case: WanCase) -> dict[str, Any]:
    """Output, shapes by diffusers' names, and those names by the original ones."""
    tensors = diffusers_wan(case).state_dict()
    return {
        "output": diffusers_wan_output(case),
        "shapes": json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()}),
        "original": json.dumps(original_names(case)),
    }


def main(argv: list[str] | None = None) -> int:
    """Write all files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=GOLDENS, help="folder for the files")
    out = parser.parse_args(argv).out
    packages = ("torch", "diffusers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    made_by = json.dumps({"python": platform.python_version(), **versions})
    out.mkdir(parents=True, exist_ok=True)
    trajectories: dict[str, Any] = {
        sampler_key(sampler): diffusers_trajectory(sampler) for sampler in SAMPLERS
    }
    np.savez_compressed(out / "sampler.npz", made_by=made_by, **trajectories)
    for name, case in WAN.items():
        np.savez_compressed(out / f"wan-{name}.npz", made_by=made_by, **wan_golden(case))
    for name, mmdit in MMDIT.items():
        np.savez_compressed(out / f"mmdit-{name}.npz", made_by=made_by, **mmdit_golden(mmdit))
    for path in sorted(out.glob("*.npz")):
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
