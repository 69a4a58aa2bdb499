"""Train the shapes model on clips that are generated on the device.

    python -m scripts.train_shapes --out runs/shapes            # 16 minutes on one H100
    python -m scripts.train_shapes --out runs/shapes            # again after a kill: goes on

Step n draws its data, noise and caption dropout from fold_in(seed, n) alone, so a run that was
killed goes on with the curve that it would have had. Writes into --out: checkpoints/ (Orbax),
config.json, loss.csv, loss.png and, at the end, the averaged weights as shapes.safetensors.
"""

import argparse
import csv
import dataclasses
import functools
import io
import json
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import rich.console
import rich.progress

from models.shapes.config import CONFIG
from models.shapes.modeling import Shapes
from models.shapes.render import render
from models.shapes.vocabulary import CAPTION_TOKENS
from models.shapes.world import VIDEO, caption_tokens, sample_scene
from sdq.files import write_atomically
from sdq.rules import flatten, path_of
from sdq.tensor_files import save_tensors

CALL_STEPS = 20  # optimiser steps of one jitted call


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights; kept beside the checkpoints and compared on resume."""

    steps: int = 24_000
    batch: int = 128
    rate: float = 2e-3
    warmup: int = 500
    decay: float = 0.4  # last part of the run, over which the rate falls to 0
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.999  # decay of the moving average of the weights
    drop_caption: float = 0.1
    two_things: float = 0.75  # share of such scenes
    shift: float = 6.0  # of the noise levels; what moves where is decided above 0.85
    floor: float = 0.2  # noise level below which errors weigh no more: edges need no more care
    seed: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds."""

    step: jax.Array
    params: Any
    average: Any
    optimiser: Any


def make_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """Muon and AdamW: warm-up, a constant rate, then a linear fall to 0."""
    falling = int(config.decay * config.steps)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.rate, config.warmup),
            optax.constant_schedule(config.rate),
            optax.linear_schedule(config.rate, 0.0, falling),
        ],
        [config.warmup, config.steps - falling],
    )
    muon = optax.contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        adam_b2=0.99,
        consistent_rms=0.2,  # steps as long as Adam's, so that one rate serves both
        muon_weight_dimension_numbers=_matrices,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), muon)


def _matrices(params: Any) -> Any:
    """Muon steps the (stacked) kernels of the blocks; everything else is Adam's."""
    stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: stacked if re.fullmatch(r"dit/blocks/.*kernel", path_of(keys)) else None,
        params,
    )


@functools.partial(jax.jit, static_argnames=("config",))  # every leaf a buffer of its own
def initial_state(config: TrainConfig) -> TrainState:
    """Fresh float32 weights and optimiser."""
    video, captions = jnp.zeros((1, *VIDEO)), jnp.zeros((1, CAPTION_TOKENS), jnp.int32)
    key = jax.random.key(config.seed)
    params = Shapes(CONFIG).init(key, video, jnp.ones((1,)), captions)["params"]
    # The last layer starts at 0: the first prediction is the mean video.
    params["dit"]["head"]["kernel"] = jnp.zeros_like(params["dit"]["head"]["kernel"])
    return TrainState(jnp.zeros((), jnp.int32), params, params, make_optimiser(config).init(params))


def loss_fn(params: Any, key: jax.Array, config: TrainConfig) -> jax.Array:
    """Mean squared error of the velocity on a fresh batch."""
    key_scene, key_noise, key_sigma, key_drop = jax.random.split(key, 4)
    draw = functools.partial(sample_scene, two=config.two_things)
    scenes = jax.vmap(draw)(jax.random.split(key_scene, config.batch))
    x0 = 2 * jax.vmap(lambda scene: render(scene).video)(scenes) - 1
    captions = jax.vmap(caption_tokens)(scenes)
    dropped = jax.random.bernoulli(key_drop, config.drop_caption, (config.batch, 1))
    captions = jnp.where(dropped, 0, captions)
    # Evenly spread over the batch, then shifted towards noise like the sampler's levels.
    u = (jnp.arange(config.batch) + jax.random.uniform(key_sigma, (config.batch,))) / config.batch
    sigma = config.shift * u / (1 + (config.shift - 1) * u)
    wide = sigma[:, None, None, None, None]
    x = (1 - wide) * x0 + wide * jax.random.normal(key_noise, x0.shape)
    model = Shapes(CONFIG, remat=True)
    prediction = jnp.asarray(model.apply({"params": params}, x, sigma, captions))
    error = (prediction - x0) / jnp.maximum(wide, config.floor)
    return jnp.mean(jnp.square(error))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnums=0)
def train_steps(state: TrainState, *, config: TrainConfig) -> tuple[TrainState, jax.Array]:
    """CALL_STEPS steps; returns the new state and the losses `[CALL_STEPS]`."""
    optimiser = make_optimiser(config)

    def one(state: TrainState, _: None) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss, gradient = jax.value_and_grad(loss_fn)(state.params, key, config)
        updates, inner = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early averages must not remember the random start.
        keep = jnp.minimum(config.average, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, state.average, params)
        return TrainState(state.step + 1, params, average, inner), loss

    return jax.lax.scan(one, state, length=CALL_STEPS)


def train(config: TrainConfig, out: pathlib.Path, *, every: float, limit: float | None) -> bool:
    """Train or go on training in `out`; True when all steps are done.

    Args:
      config: of the run; must equal the one that `out` was begun with.
      out: folder of the run.
      every: seconds between checkpoints.
      limit: stop (resumably) after so many seconds.
    """
    _check_config(config, out)
    console = rich.console.Console(stderr=True)
    bar = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.TextColumn("loss {task.fields[loss]:.4f}"),
        console=console,
    )
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((out / "checkpoints").absolute(), options=options) as manager, bar:
        state = initial_state(config)
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
            console.print(f"going on from step {int(state.step)}")
        losses = [row for row in read_losses(out) if row[0] < int(state.step)]
        before = losses[-1][2] if losses else 0.0
        task = bar.add_task("train", total=config.steps, completed=int(state.step), loss=np.nan)
        start = saved = time.monotonic()
        while (step := int(state.step)) < config.steps:
            state, new = train_steps(state, config=config)
            new = np.asarray(new)
            if not np.isfinite(new).all():
                raise FloatingPointError(f"the loss is not finite after step {step}")
            now = time.monotonic()
            losses.append((step, float(new.mean()), round(before + now - start, 1)))
            step += CALL_STEPS
            bar.update(task, completed=step, loss=losses[-1][1])
            stop = limit is not None and now - start > limit
            if now - saved > every or step >= config.steps or stop:
                # The curve first: rows beyond the checkpoint are dropped on resume, rows that are
                # missing before it could not be had again.
                write_losses(out, losses)
                manager.save(step, args=ocp.args.StandardSave(state))
                saved = now
            if stop:
                break
    plot_losses(losses, out / "loss.png")
    export(state.average, out / "shapes.safetensors", config)
    return int(state.step) >= config.steps


def export(params: Any, path: pathlib.Path, config: TrainConfig) -> None:
    """Write the weights as bfloat16 safetensors, leaf paths as names."""
    leaves = {name: np.asarray(leaf, jnp.bfloat16) for name, leaf in flatten(params).items()}
    metadata = {"model": "shapes", "training": json.dumps(dataclasses.asdict(config))}
    save_tensors(leaves, path, metadata)


def _check_config(config: TrainConfig, out: pathlib.Path) -> None:
    file = out / "config.json"
    text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    if file.exists() and file.read_text() != text:
        raise ValueError(
            f"{out} holds a run with another configuration:\n{file.read_text()}"
            "give its options again, or another --out"
        )
    write_atomically(file, text.encode())


def read_losses(out: pathlib.Path) -> list[tuple[int, float, float]]:
    """Rows (step, loss, seconds) of an earlier part of the run."""
    file = out / "loss.csv"
    if not file.exists():
        return []
    with file.open() as stream:
        rows = list(csv.reader(stream))[1:]
    return [(int(step), float(loss), float(seconds)) for step, loss, seconds in rows]


def write_losses(out: pathlib.Path, losses: list[tuple[int, float, float]]) -> None:
    """All rows (step, mean loss of the CALL_STEPS from there, seconds trained so far)."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("step", "loss", "seconds"), *losses])
    write_atomically(out / "loss.csv", text.getvalue().encode())


def plot_losses(losses: list[tuple[int, float, float]], path: pathlib.Path) -> None:
    """The loss curve as a picture."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, values, _ = zip(*losses, strict=True)
    axes.plot(steps, values, linewidth=1)
    axes.set(xlabel="step", ylabel="velocity loss", yscale="log", title="shapes")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the run")
    for field in dataclasses.fields(TrainConfig):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help="(default: %(default)s)",
        )
    parser.add_argument(
        "--checkpoint-every", type=float, default=120, help="seconds (default: %(default)s)"
    )
    parser.add_argument("--stop-after", type=float, help="seconds, then stop resumably")
    args = parser.parse_args()
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: getattr(args, name) for name in names})
    done = train(config, args.out, every=args.checkpoint_every, limit=args.stop_after)
    print(f"{'done' if done else 'stopped; run again to go on'}: {args.out}")


if __name__ == "__main__":
    main()
