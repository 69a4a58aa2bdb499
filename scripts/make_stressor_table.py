"""How heavy the tails of the shapes model's linear inputs are, before and after the stressors.

python -m scripts.make_stressor_table --out docs/results
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.shapes.config import CONFIG
from models.shapes.generate import start
from models.shapes.modeling import Shapes
from models.shapes.params import load
from models.shapes.render import render
from models.shapes.stressors import TAIL
from models.shapes.world import caption_tokens, sample_scene
from scripts import _results as results
from sdq.rules import flatten

CLIPS = 8
LEVELS = (0.95, 0.6, 0.2)  # of noise
# Largest channel over the median one of the keys of three large models, as measured for the KV
# cache; the only such ratios of video transformers that we know.
LARGE_MODELS = {"Self-Forcing (Wan 1.3B)": 5.4, "LongCat-Video": 9.0, "HunyuanVideo": 12.8}


def channel_statistics(x: np.ndarray) -> dict[str, float]:
    """Means over the blocks, from `[layers, B, S, C]`: kurtosis and largest over median channel."""
    x = x.astype(np.float64).reshape(len(x), -1, x.shape[-1])
    centred = x - x.mean(axis=(1, 2), keepdims=True)
    kurtosis = (centred**4).mean(axis=(1, 2)) / np.square((centred**2).mean(axis=(1, 2)))
    channels = np.sqrt(np.square(x).mean(axis=1))
    ratio = channels.max(axis=1) / np.median(channels, axis=1)
    return {"kurtosis": float(kurtosis.mean()), "max / median": float(ratio.mean())}


def measure(params: Any) -> dict[str, dict[str, float]]:
    """`channel_statistics` of the input of every linear of the blocks, means over LEVELS."""
    numbers = jnp.arange(CLIPS)
    scenes = jax.vmap(lambda n: sample_scene(jax.random.key(n), held_out=True))(numbers)
    tokens = jax.vmap(caption_tokens)(scenes)
    clean = 2 * jax.vmap(lambda scene: render(scene).video)(scenes) - 1
    noise = start(jax.random.key(0), numbers)
    model = Shapes(CONFIG, dtype=jnp.float32)

    @jax.jit
    def inputs(level: jax.Array) -> dict[str, jax.Array]:
        x = (1 - level) * clean + level * noise
        levels = jnp.broadcast_to(level, CLIPS)
        _, seen = model.apply({"params": params}, x, levels, tokens, mutable=["intermediates"])
        return flatten(seen["intermediates"]["dit"]["blocks"])

    found = []
    for level in LEVELS:
        seen = inputs(jnp.float32(level))
        names = [name for name in seen if name.endswith("_input")]
        found.append({name: channel_statistics(np.asarray(seen[name])) for name in names})
    return {
        name.removesuffix("_input"): {
            key: float(np.mean([level[name][key] for level in found])) for key in found[0][name]
        }
        for name in found[0]
    }


def main() -> None:
    """Measure both and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    args = parser.parse_args()
    before, after = measure(load(stressed=False)), measure(load())
    where = results.environment(
        "make_stressor_table",
        data=f"{CLIPS} held-out clips at noise levels {', '.join(map(str, LEVELS))}",
        scales=", ".join(f"{share:.1%} of the channels times {s:g}" for s, share in TAIL.items()),
    )
    rows = [
        f"| `{name}` | {before[name]['kurtosis']:.1f} | {after[name]['kurtosis']:.1f} | "
        f"{before[name]['max / median']:.1f} | {after[name]['max / median']:.1f} |"
        for name in before
    ]
    page = results.page(
        "Tails of the inputs of linears",
        where,
        "Means over blocks and noise levels. Kurtosis: of all values, 3 for Gaussian ones. Largest "
        "over median channel: of the channels' root mean squares. The inputs of `ffn/down` cannot "
        "be rescaled (GELU), their tails are the model's own.",
        "",
        "| input of | kurtosis before | after | largest / median channel before | after |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Largest over median channel reported for large models (keys, before rotary embedding): "
        + ", ".join(f"{name} {ratio}" for name, ratio in LARGE_MODELS.items())
        + ".",
    )
    print(page)
    if args.out:
        document = {"environment": where, "before": before, "after": after}
        results.write(args.out, "shapes_stressors", page, document)


if __name__ == "__main__":
    main()
