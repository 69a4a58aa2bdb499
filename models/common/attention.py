"""Softmax attention that never holds an S x S matrix of a long sequence, on any backend."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import Projected, prepared

IMPLEMENTATIONS = ("cudnn", "chunked")
SCORES_AT_ONCE = 2**24  # elements of the score matrix that `chunked` holds: 64 MiB


def attention(
    q: jax.Array | Projected,
    k: jax.Array | Projected,
    v: jax.Array,
    *,
    lengths: jax.Array | None = None,
    implementation: str | None = None,
    prepare: Callable[[jax.Array | Projected], jax.Array] = prepared,
) -> jax.Array:
    """softmax(q k^T / sqrt(width)) v.

    Args:
      q: `[B, S, heads, width]`.
      k: `[B, S', heads, width]`.
      v: like k, an array.
      lengths: how many of each video's keys count, the first ones: int32 `[B]`, each at least 1;
        None: all.
      implementation: "cudnn" (NVIDIA GPUs, 16-bit floats), "chunked" (anything: a few queries at a
        time, softmax in float32), or None: cuDNN where it can, else chunked.
      prepare: makes heads of what is Projected.
    Returns:
      `[B, S, heads, width]` in q's dtype.
    """
    q, k = prepare(q), prepare(k)
    if implementation is None:
        implementation = "cudnn" if _cudnn_can(q, k) else "chunked"
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    if implementation == "chunked":
        return _chunked(q, k, v, counting(lengths, k.shape[1]))
    raise ValueError(
        f"implementation: expected one of {', '.join(IMPLEMENTATIONS)} or None, "
        f"got {implementation!r}"
    )


def counting(lengths: jax.Array | None, keys: int) -> jax.Array | None:
    """Which of so many keys count: bool `[B, keys]`, or None for all."""
    return None if lengths is None else jnp.arange(keys)[None] < lengths[:, None]


def _cudnn_can(q: jax.Array, k: jax.Array) -> bool:
    """Also differentiated: its backward pass wants even lengths."""
    narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return jax.default_backend() == "gpu" and narrow and even and fits


def _chunked(q: jax.Array, k: jax.Array, v: jax.Array, counts: jax.Array | None) -> jax.Array:
    batch, length, heads, _ = q.shape
    chunk = max(1, SCORES_AT_ONCE // (batch * heads * k.shape[1]))
    if chunk >= length:
        return _direct(q, k, v, counts)
    count = -(-length // chunk)
    chunk = -(-length // count)
    padded = jnp.pad(q, [(0, 0), (0, count * chunk - length), (0, 0), (0, 0)])
    chunks = jnp.moveaxis(padded.reshape(batch, count, chunk, heads, -1), 1, 0)
    # The backward pass computes the scores again instead of keeping all of them.
    out = jax.lax.map(jax.checkpoint(lambda part: _direct(part, k, v, counts)), chunks)
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :length]


def _direct(q: jax.Array, k: jax.Array, v: jax.Array, counts: jax.Array | None) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    if counts is not None:
        scores = jnp.where(counts[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
