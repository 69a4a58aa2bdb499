"""Softmax attention that never holds an S x S matrix of a long sequence, on any backend."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdq import fake_quantize, formats

IMPLEMENTATIONS = ("cudnn", "chunked")
SCORES_AT_ONCE = 2**24  # elements of the score matrix that `chunked` holds: 64 MiB
Rounding = Callable[[jax.Array], jax.Array]


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(width)) v, without mask.

    Args:
      q: `[B, S, heads, width]`.
      k: `[B, S', heads, width]`.
      v: like k.
      implementation: "cudnn" (NVIDIA GPUs, 16-bit floats), "chunked" (anything: a few queries at a
        time, softmax in float32), or None: cuDNN where it can, else chunked.
    Returns:
      `[B, S, heads, width]` in q's dtype.
    """
    if implementation is None:
        implementation = "cudnn" if _cudnn_can(q, k) else "chunked"
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if implementation == "chunked":
        return _chunked(q, k, v)
    raise ValueError(
        f"implementation: expected one of {', '.join(IMPLEMENTATIONS)} or None, "
        f"got {implementation!r}"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedAttention:
    """Attention with all operands of both products rounded ("full path"); for `Ops.attention`.

    Queries and keys in blocks along the width, values and probabilities along the keys. The
    probabilities of a query sum to 1 after rounding. Plain jnp, a few queries at a time: says what
    the rounding costs, is no faster.
    """

    format: str

    def __post_init__(self):
        formats.parse(self.format)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """As `attention`."""
        rounded = functools.partial(fake_quantize, fmt=self.format, select=self._select)
        return _chunked(rounded(q), rounded(k), rounded(v, axis=1), rounded)

    @property
    def _select(self) -> str | None:
        return "two_stage" if formats.parse(self.format).has_choice else None


def _cudnn_can(q: jax.Array, k: jax.Array) -> bool:
    """Also differentiated: its backward pass wants even lengths."""
    narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return jax.default_backend() == "gpu" and narrow and even and fits


def _chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, rounded: Rounding | None = None
) -> jax.Array:
    batch, length, heads, _ = q.shape
    chunk = max(1, SCORES_AT_ONCE // (batch * heads * k.shape[1]))
    if chunk >= length:
        return _direct(q, k, v, rounded)
    count = -(-length // chunk)
    chunk = -(-length // count)
    padded = jnp.pad(q, [(0, 0), (0, count * chunk - length), (0, 0), (0, 0)])
    chunks = jnp.moveaxis(padded.reshape(batch, count, chunk, heads, -1), 1, 0)
    # The backward pass computes the scores again instead of keeping all of them.
    out = jax.lax.map(jax.checkpoint(lambda part: _direct(part, k, v, rounded)), chunks)
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :length]


def _direct(q: jax.Array, k: jax.Array, v: jax.Array, rounded: Rounding | None = None) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5
    if rounded is None:
        return _weighted(jax.nn.softmax(scores * scale, axis=-1), v).astype(q.dtype)
    # Scaled last: the largest weight is 1 exactly, whatever the compiler fuses, and not just below,
    # which would be another exponent for the whole row.
    weights = rounded(jnp.exp((scores - scores.max(axis=-1, keepdims=True)) * scale))
    total = jnp.moveaxis(weights.sum(axis=-1), 1, 2)[..., None]
    return (_weighted(weights, v) / total).astype(q.dtype)


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Values `[B, S', heads, width]` weighted by `[B, heads, S, S']`: float32 `[B, S, ...]`."""
    weights = weights.astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32)
