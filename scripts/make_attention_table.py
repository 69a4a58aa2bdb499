"""What rounding an attention's operands costs, on the shapes model's own and on heavy tails.

    python -m scripts.make_attention_table --out docs/results

Decibels of the attention's output, of every self-attention of the bf16 model along a trajectory
(teacher-forced: each sees exact inputs), and of synthetic operands with long tails. On a Hopper GPU
by the kernel, elsewhere by the same arithmetic in plain jnp; weights are e4m3. The last two ways
keep them in float32, to see what smoothing of queries would win: taking from those of a tile their
mean, and adding its scores again, which a kernel would have to.
"""

import dataclasses
import functools
import math
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
from pallas_kernels.mosaic_gpu.attention_operands import rounded
from scripts import _results as results
from sdq import sqnr_db
from sdq.rotate import hadamard, largest_group

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
WITH_EXACT_WEIGHTS = {
    "all fp8, rotated; exact weights": False,
    "the same, queries smoothed": True,
}
TILE = 128  # queries that are smoothed together


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
    for smooth in WITH_EXACT_WEIGHTS.values():
        found.append(jax.vmap(sqnr_db)(exact, with_exact_weights(q, k, v, smooth)))
    return jnp.stack(found)


def with_exact_weights(q: jax.Array, k: jax.Array, v: jax.Array, smooth: bool) -> jax.Array:
    """softmax(q k^T) v of fp8 operands, centred and rotated, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k = k - k.mean(axis=1, keepdims=True)
    q, k = (hadamard(x, largest_group(x.shape[-1])) for x in (q, k))
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    mean = jnp.zeros_like(q)
    if smooth:
        tiles = q.reshape(q.shape[0], -1, math.gcd(TILE, q.shape[1]), *q.shape[2:])
        mean = jnp.broadcast_to(tiles.mean(axis=2, keepdims=True), tiles.shape).reshape(q.shape)
    parts = rounded(q - mean, k, v, None, None)
    queries, keys, values = (x.values.astype(jnp.float32) * x.scales for x in parts)
    scores = product("bhsd,bhld->bhsl", queries, keys) + product("bshd,blhd->bhsl", mean, k)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
    return product("bhsl,bhdl->bshd", weights, values)


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
    for number, way in enumerate([*WAYS, *WITH_EXACT_WEIGHTS]):
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
        "a query, head or channel. Weights are e4m3 unless said.",
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
            "ways": [*WAYS, *WITH_EXACT_WEIGHTS],
            "decibels": {name: of.mean(axis=-1).tolist() for name, of in found.items()},
        }
        stem = "attention_hopper_error" if by == "mosaic_gpu" else "attention_error"
        results.write(args.out, stem, page, document)


if __name__ == "__main__":
    main()
