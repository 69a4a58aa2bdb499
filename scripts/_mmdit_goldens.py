"""What diffusers computes for tiny MMDiTs with random weights; `make_goldens` writes it."""

import dataclasses
import json
import math
import zlib
from typing import Any

import numpy as np

from models.mmdit.config import MMDiTConfig
from models.mmdit.params import abstract_params, sources
from sdq.rules import flatten


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MMDiTCase:
    """A tiny MMDiT with random weights.

    Attributes:
      config: its size.
      original: the original layout of its checkpoints.
      layouts: those that the tests read; "diffusers" among them where diffusers has the model.
    """

    config: MMDiTConfig
    original: str
    layouts: tuple[str, ...]


_FLUX = MMDiTConfig(
    width=48,
    heads=3,
    double_blocks=2,
    single_blocks=3,
    mlp_width=192,
    in_channels=4,
    out_channels=4,
    text_width=20,
    pooled_width=12,
    rope_widths=(4, 6, 6),
    guidance=True,
)
MMDIT = {
    "flux": MMDiTCase(config=_FLUX, original="flux", layouts=("diffusers", "flux")),
    "open-sora": MMDiTCase(
        config=dataclasses.replace(_FLUX, guidance=False, cond_channels=5),
        original="flux",
        layouts=("open-sora", "flux"),
    ),
    "hunyuanvideo": MMDiTCase(
        config=dataclasses.replace(_FLUX, refiner_blocks=2, text_first=False, rope_theta=256.0),
        original="hunyuan",
        layouts=("diffusers", "hunyuan"),
    ),
}
VIDEO_SIZE = (3, 4, 8)  # (T, H, W): another number of tokens along each axis
TEXT_TOKENS = 7
MMDIT_TOLERANCE = 2e-5  # absolute, float32
CONVERTED_WIDTH = 3072  # the only one that diffusers' converters know


def mmdit_inputs(case: MMDiTCase) -> dict[str, np.ndarray]:
    """The arguments of our model, by name."""
    config, random = case.config, np.random.RandomState(1)
    inputs = {
        "x": random.standard_normal((2, *VIDEO_SIZE, config.in_channels)),
        "text": random.standard_normal((2, TEXT_TOKENS, config.text_width)),
        "pooled": random.standard_normal((2, config.pooled_width)),
        "t": np.array([250.0, 750.0]),  # exact also as parts of 1000
    }
    if config.guidance:
        # Times 1000 these are angles. Those of real scales, 6000, are exact to 4e-4 in float32,
        # here as in diffusers, and then outputs differ by 7e-5.
        inputs["guidance"] = np.array([0.5, 0.25])
    if config.cond_channels is not None:
        inputs["cond"] = random.standard_normal((2, *VIDEO_SIZE, config.cond_channels))
    floats = {name: value.astype(np.float32) for name, value in inputs.items()}
    if config.text_first:
        return floats
    return floats | {"text_lengths": np.array([TEXT_TOKENS - 2, TEXT_TOKENS], np.int32)}


def mmdit_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name in diffusers' layout: N(0, 0.1), but norms' weights N(1, 0.1)."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    centre = 1.0 if name.endswith(".weight") and len(shape) == 1 else 0.0
    return (centre + 0.1 * normal).astype(np.float32)


def diffusers_mmdit(case: MMDiTCase) -> Any:
    """diffusers' model with `mmdit_weight`s; a condition is further channels of FLUX's input."""
    import diffusers
    import torch

    config = case.config
    common = {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "guidance_embeds": config.guidance,
        "pooled_projection_dim": config.pooled_width,
    }
    pixels = math.prod(config.patch)
    if config.refiner_blocks:
        model: Any = diffusers.HunyuanVideoTransformer3DModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_refiner_layers=config.refiner_blocks,
            mlp_ratio=config.mlp_width / config.width,
            patch_size=config.patch[1],
            patch_size_t=config.patch[0],
            text_embed_dim=config.text_width,
            rope_theta=config.rope_theta,
            rope_axes_dim=config.rope_widths,
            **common,
        )
    else:
        model = diffusers.FluxTransformer2DModel(
            in_channels=(config.in_channels + (config.cond_channels or 0)) * pixels,
            out_channels=config.out_channels * pixels,
            joint_attention_dim=config.text_width,
            axes_dims_rope=config.rope_widths,
            **common,
        )
    weights = {
        name: torch.from_numpy(mmdit_weight(name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(weights, strict=True)
    return model.eval()


def diffusers_mmdit_output(case: MMDiTCase) -> np.ndarray:
    """What diffusers computes for `mmdit_inputs`, `[2, *VIDEO_SIZE, out_channels]`."""
    import torch

    config, model = case.config, diffusers_mmdit(case)
    inputs = {name: torch.from_numpy(value) for name, value in mmdit_inputs(case).items()}
    text = {"encoder_hidden_states": inputs["text"], "pooled_projections": inputs["pooled"]}
    with torch.no_grad():
        if config.refiner_blocks:
            mask = torch.arange(TEXT_TOKENS)[None] < inputs["text_lengths"][:, None]
            (out,) = model(
                hidden_states=inputs["x"].movedim(-1, 1),
                timestep=inputs["t"],
                guidance=1000 * inputs["guidance"],
                encoder_attention_mask=mask,
                return_dict=False,
                **text,
            )
            return out.movedim(1, -1).numpy()
        videos = [inputs[name].numpy() for name in ("x", "cond") if name in inputs]
        tokens = np.concatenate([packed(video, config.patch) for video in videos], axis=-1)
        grid = np.indices(config.grid(VIDEO_SIZE)).reshape(3, -1).T.copy()
        (out,) = model(
            hidden_states=torch.from_numpy(tokens),
            timestep=inputs["t"] / 1000,
            guidance=inputs.get("guidance"),
            img_ids=torch.from_numpy(grid),
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            return_dict=False,
            **text,
        )
    return unpacked(out.numpy(), config)


def original_names(case: MMDiTCase) -> dict[str, list[str]]:
    """Which of diffusers' tensors are the rows of each original one, by diffusers' own converter.

    Their names in order; with a "-" in front where the converter swaps the halves.
    """
    import torch
    from diffusers.loaders import single_file_utils

    config = dataclasses.replace(case.config, cond_channels=None)  # a tensor of its own
    depth = {path: leaf.shape[0] for path, leaf in flatten(abstract_params(case.config)).items()}
    ours = sorted(
        {
            name
            for path, source in sources(config, case.original).items()
            for name in source.names(depth[path])
        }
    )
    # The converters cut along rows, so that a vector can stand for a tensor: all elements differ.
    heights = {"qkv": 3, "linear1": 7, "adaLN_modulation": 2}
    tensors, size = {}, 8 * CONVERTED_WIDTH
    for number, name in enumerate(ours):
        parts = next((n for key, n in heights.items() if key in name), 1)
        tensors[name] = number * size + torch.arange(parts * CONVERTED_WIDTH)
    convert = {
        "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        "hunyuan": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    }[case.original]
    found: dict[str, dict[int, str]] = {name: {} for name in ours}
    for name, tensor in convert(dict(tensors)).items():
        number, row = divmod(int(tensor.min()), size)
        found[ours[number]][row] = name if tensor[0] < tensor[-1] else f"-{name}"
    return {name: [parts[row] for row in sorted(parts)] for name, parts in found.items()}


def mmdit_golden(case: MMDiTCase) -> dict[str, Any]:
    """Output, shapes by diffusers' names, and `original_names`."""
    tensors = diffusers_mmdit(case).state_dict()
    return {
        "output": diffusers_mmdit_output(case),
        "shapes": json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()}),
        "original": json.dumps(original_names(case)),
    }


def packed(video: np.ndarray, patch: tuple[int, int, int]) -> np.ndarray:
    """`[B, T, H, W, C]` -> tokens `[B, S, C * ph * pw]`, as FLUX's pipelines do."""
    batch, t, h, w, channels = video.shape
    _, ph, pw = patch
    video = video.reshape(batch, t, h // ph, ph, w // pw, pw, channels)
    return video.transpose(0, 1, 2, 4, 6, 3, 5).reshape(batch, -1, channels * ph * pw)


def unpacked(
    tokens: np.ndarray, config: MMDiTConfig, size: tuple[int, int, int] = VIDEO_SIZE
) -> np.ndarray:
    """The inverse for the channels of the output; `size` is (T, H, W)."""
    t, h, w = size
    _, ph, pw = config.patch
    video = tokens.reshape(len(tokens), t, h // ph, w // pw, config.out_channels, ph, pw)
    return video.transpose(0, 1, 2, 5, 3, 6, 4).reshape(len(tokens), t, h, w, -1)
