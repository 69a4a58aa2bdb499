"""What rounding an attention's operands costs, on the shapes model's own and on heavy tails.

    python -m scripts.make_attention_table --out docs/results

Decibels of the attention's output, of every self-attention of the bf16 model along a trajectory
(teacher-forced: each sees exact inputs), and of synthetic operands with long tails. On a Hopper GPU
by the kernel, weights rounded to e4m3; elsewhere by its reference, which keeps them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.attention import attention
from models.common.layers import Ops
from models.shapes.config import CONFIG
from models.shapes.generate import Settings, generate, start
from models.shapes.params import load
from models.shapes.world import VIDEO, caption_tokens, sample_scene
from pallas_kernels import Projected, prepared, quantized_attention
from pallas_kernels.attention import rounding_weights_too
from scripts import _results as results
from sdq import sqnr_db

TOKENS = int(np.prod(CONFIG.dit.grid(VIDEO[:3])))
SDQ = "sdq32:16"
WAYS: dict[str, dict[str, Any]] = {
    "4 bits, as they are": {"center": False},
    "4 bits, keys centred": {},
    "4 bits, centred and rotated": {"rotate": True},
    "fp8 scores, 4-bit values": {"fmt_qk": None},
    "fp8 scores, 4-bit values, as they are": {"fmt_qk": None, "center": False},
    "4-bit scores, fp8 values": {"fmt_pv": None},
    "all fp8": {"fmt_qk": None, "fmt_pv": None},
    "all fp8, rotated": {"fmt_qk": None, "fmt_pv": None, "rotate": True},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Compared:
    """An attention that is exact, and notes what every way would have made of the same inputs."""

    note: Callable[[Any], None]

    def __call__(
        self, q: jax.Array | Projected, k: jax.Array | Projected, v: jax.Array
    ) -> jax.Array:
        """As `attention`."""
        q, k = prepared(q), prepared(k)
        y = attention(q, k, v)
        if k.shape[1] == TOKENS:
            jax.debug.callback(self.note, decibels(q, k, v))
        return y


def decibels(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """SQNR of every way, `[ways, B]`."""
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="chunked")
    found = []
    by = {"implementation": rounding_weights_too(q)}
    for options in WAYS.values():
        y = quantized_attention(q, k, v, **({"fmt_qk": SDQ, "fmt_pv": SDQ} | options | by))
        found.append(jax.vmap(sqnr_db)(exact, y.astype(jnp.float32)))
    return jnp.stack(found)


def of_shapes(prompts: int) -> np.ndarray:
    """`[attentions, ways, B]`."""
    seen: list[np.ndarray] = []
    settings = Settings(ops=Ops(attention=Compared(lambda found: seen.append(np.asarray(found)))))
    key = jax.random.key(0)
    numbers = jnp.arange(prompts)
    scenes = jax.vmap(lambda n: sample_scene(jax.random.fold_in(key, n), held_out=True))(numbers)
    tokens = jax.vmap(caption_tokens)(scenes)
    jax.block_until_ready(generate(load(), tokens, start(key, numbers), settings=settings))
    jax.effects_barrier()
    return np.stack(seen)


def long_tails(batch: int, tokens: int = 2048, heads: int = 2, width: int = 128) -> np.ndarray:
    """Student-t queries and keys, loud channels, keys with a mean: `[1, ways, B]`."""
    rng = np.random.RandomState(0)
    shape = (batch, tokens, heads, width)
    loud = np.exp(0.5 * rng.randn(1, 1, heads, width))
    mean = 2 * rng.randn(1, 1, heads, width)
    q, k, v = (rng.standard_t(4, shape) for _ in range(3))
    operands = (jnp.asarray(x, jnp.bfloat16) for x in (q / loud, (k + mean) * loud, v))
    return np.asarray(jax.jit(decibels)(*operands))[None]


def to_markdown(found: dict[str, np.ndarray], where: dict[str, str]) -> str:
    """The page that goes into docs/results."""
    columns = [f"{name} | worst" for name in found]
    lines = ["", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * (2 * len(found))]
    for number, way in enumerate(WAYS):
        cells = []
        for of in found.values():
            each = of[:, number].mean(axis=-1)
            error = of[:, number].mean(axis=0).std(ddof=1) / of.shape[-1] ** 0.5
            cells.append(f"{each.mean():.1f} ± {error:.1f} | {each.min():.1f}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return results.page(
        "What rounding an attention's operands costs",
        where,
        "SQNR of the output in decibels, mean over attentions and prompts, ± standard error over "
        "prompts; worst: of a block and step. `"
        + SDQ
        + "` unless said; fp8: e4m3 with an exponent "
        "a query, head or channel. Weights are e4m3 throughout.",
        *lines,
    )


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = results.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=8, help="videos (default: 8)")
    args = parser.parse_args()
    if args.prompts < 2:
        parser.error(f"--prompts: expected at least 2, got {args.prompts}")
    q = jax.ShapeDtypeStruct((1, 1, 1, 128), jnp.bfloat16)
    by = rounding_weights_too(q)
    where = results.environment("make_attention_table", prompts=str(args.prompts), by=by)
    found = {"shapes": of_shapes(args.prompts), "long tails": long_tails(args.prompts)}
    page = to_markdown(found, where)
    print(page)
    if args.out:
        document = {
            "environment": where,
            "ways": list(WAYS),
            "decibels": {name: of.mean(axis=-1).tolist() for name, of in found.items()},
        }
        stem = "attention_hopper_error" if by == "mosaic_gpu" else "attention_error"
        results.write(args.out, stem, page, document)


if __name__ == "__main__":
    main()
