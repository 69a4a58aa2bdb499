"""quantized_attention: softmax(q k^T) v of fp8 operands, or of 4-bit ones, which are fp8 too."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.mosaic_gpu import attention_plain
from pallas_kernels.mosaic_gpu.attention_operands import (
    KEYS,
    WIDTHS,
    Operands,
    Rounded,
    arranged,
    of_all_heads,
    rounded,
    slopes,
)
from pallas_kernels.projected import Projected, each_head_normed, every, prepared, projected
from sdq import formats
from sdq.rotate import hadamard, largest_group

IMPLEMENTATIONS = ("mosaic_gpu", "reference", "plain")  # the first that fits is taken
KEYS_AT_ONCE = 512  # whose scores the reference holds
KEYS_IN_MEAN = 4096  # that a mean is taken of


def quantized_attention(
    q: jax.Array | Projected,
    k: jax.Array | Projected,
    v: jax.Array,
    *,
    fmt_qk: str | None = None,
    fmt_pv: str | None = None,
    center: bool = True,
    rotate: bool = False,
    mask: jax.Array | None = None,
    causal: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v, with the operands of both products rounded.

    Queries and keys are rounded in blocks along the width, values in blocks along the keys. Weights
    are kept in float32 by "reference" and rounded to e4m3 by "mosaic_gpu", and by "plain", which is
    the same arithmetic in plain jnp and runs anywhere. What comes before rounding is computed in
    float32, or with `fmt_qk` in q's dtype.

    Args:
      q: `[B, S, H, D]`, or Projected: from bf16, without formats, mask and causal, all that comes
        before the products is done by kernels then, in as few passes over memory as it takes; but
        a norm over each head alone comes first, and is rounded to q's dtype.
      k: `[B, L, H, D]`, likewise.
      v: `[B, L, H, D]`.
      fmt_qk: dialect format of queries and keys, blocks choosing in two stages; None: e4m3, with an
        exponent for each query and for the keys of a head: as fast, and closer.
      fmt_pv: of the values, likewise; None: an exponent for each channel.
      center: subtract a mean key before rounding, which changes no weight: of KEYS_IN_MEAN evenly
        spaced ones, or of all if there are fewer.
      rotate: turn queries and keys by a Hadamard matrix before rounding, which changes no score.
      mask: bool `[B, L]`, which keys count; a query without any gets zeros.
      causal: tokens of a block, of which each sees its own block and those before; None: all see
        all. Exponents, and the mean key, are of all keys either way. Blocks are filled up to whole
        tiles of 128: short ones are slow.
      scale: 1 / sqrt(D) by default.
      implementation: one of IMPLEMENTATIONS; None takes the first that fits.
    Returns:
      `[B, S, H, D]` in q's dtype. Videos or heads with a NaN among what counts are NaN.
    Raises:
      ValueError: operands that no implementation takes, or that the one asked for does not.
    """
    _check(q, k, v, fmt_qk, fmt_pv, mask, causal, scale)
    chosen = _chosen(implementation, q)
    counts = jnp.ones(k.shape[:2], bool) if mask is None else mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = each_head_normed(q), each_head_normed(k)
    (_, length, heads, _), out_dtype, block = q.shape, q.dtype, None
    everything = mask is None and causal is None and fmt_qk is None and fmt_pv is None
    if chosen == "mosaic_gpu" and everything and _kernels_read(q, k, v):
        y = _attend(_by_kernels(q, k, v, center, rotate, scale), heads, None, out_dtype)
        return y[:, :length]
    mean = _mean_key(k, counts) if center else None
    q, k = (prepared(x, jnp.float32 if fmt_qk is None else x.dtype) for x in (q, k))
    if causal is not None and causal < length:
        q, k, v, counts = (_blocks_filled(x, causal) for x in (q, k, v, counts))
        block = causal + -causal % KEYS
    if rotate:
        group = largest_group(q.shape[-1])
        q, k = hadamard(q, group), hadamard(k, group)
        mean = None if mean is None else hadamard(mean, group)
    if mean is not None:  # last, where it becomes a part of rounding
        k = (k.astype(jnp.float32) - mean[:, None]).astype(k.dtype)
    # What does not count must not be the largest either.
    k, v = (jnp.where(counts[:, :, None, None], x, jnp.zeros((), x.dtype)) for x in (k, v))
    operands = rounded(q, k, v, fmt_qk, fmt_pv)
    if chosen == "reference":
        y = _reference(*operands, counts, block, scale).astype(out_dtype)
    elif chosen == "plain":
        laid_out = arranged(*operands, counts, scale)
        y = attention_plain.attend(laid_out, heads=heads, block=block, out_dtype=out_dtype)
    else:
        y = _attend(arranged(*operands, counts, scale), heads, block, out_dtype)
    if causal is not None and block is not None:
        y = _without_filling(y[:, : q.shape[1]], causal, block)
    return y[:, :length]


def _attend(operands: Operands, heads: int, block: int | None, out_dtype: Any) -> jax.Array:
    from pallas_kernels.mosaic_gpu.attention import attend, heuristic

    return attend(
        *operands,
        heads=heads,
        block=block,
        config=heuristic(block),
        out_dtype=out_dtype,
        num_sms=device.current().cores,
    )


def _kernels_read(*x: jax.Array | Projected) -> bool:
    from pallas_kernels.mosaic_gpu.heads import misfit

    return all(misfit(projected(each)) is None for each in x)


def _by_kernels(
    q: jax.Array | Projected,
    k: jax.Array | Projected,
    v: jax.Array,
    center: bool,
    rotate: bool,
    scale: float,
) -> Operands:
    """What the plain path does, all keys counting, and a little more exactly."""
    from pallas_kernels.mosaic_gpu import heads

    num_sms = device.current().cores
    mean = _mean_key(k, jnp.ones(k.shape[:2], bool)) if center else None
    queries = heads.queries(projected(q), rotate=rotate, num_sms=num_sms)
    keys = heads.keys(projected(k), rotate=rotate, center=mean, num_sms=num_sms)
    values = heads.values(projected(v), num_sms=num_sms)
    slope = slopes(queries, keys, scale)
    return of_all_heads(queries.values, slope, keys.values, values.values, values.scales[..., 0])


def _blocks_filled(x: jax.Array, causal: int) -> jax.Array:
    """`[B, S, ...]` with zeros, or False, that fill the last block, and every block's last tile."""
    none = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % causal), *none])
    x = x.reshape(x.shape[0], -1, causal, *x.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -causal % KEYS), *none])
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _without_filling(y: jax.Array, causal: int, block: int) -> jax.Array:
    """The inverse, blocks being `block` long; what fills the last one stays."""
    y = y.reshape(y.shape[0], -1, block, *y.shape[2:])[:, :, :causal]
    return y.reshape(y.shape[0], -1, *y.shape[3:])


def supports(implementation: str, q: jax.Array | Projected | jax.ShapeDtypeStruct) -> str | None:
    """Why an implementation cannot attend with these queries here; None if it can."""
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation: expected one of {known}, got {implementation!r}")
    if implementation != "mosaic_gpu":
        return None
    if reason := device.without_mosaic_gpu():
        return reason
    if q.shape[-1] not in WIDTHS:
        return f"heads of {q.shape[-1]}; only {', '.join(map(str, WIDTHS))}"
    return None


def rounding_weights_too(q: jax.Array | Projected | jax.ShapeDtypeStruct) -> str:
    """The implementation to ask for so that every machine computes the same: kernel or "plain"."""
    return "mosaic_gpu" if supports("mosaic_gpu", q) is None else "plain"


def _chosen(implementation: str | None, q: jax.Array | Projected) -> str:
    if implementation is None:
        return next(name for name in IMPLEMENTATIONS if supports(name, q) is None)
    if reason := supports(implementation, q):
        raise ValueError(f"quantized_attention: {implementation} cannot do this: {reason}")
    return implementation


def _mean_key(k: jax.Array | Projected, counts: jax.Array) -> jax.Array:
    """Of some keys that count, float32 `[B, H, D]`; zeros if none of these does."""
    step = -(-k.shape[1] // KEYS_IN_MEAN)
    some, counts = prepared(every(k, step), jnp.float32), counts[:, ::step]
    total = jnp.where(counts[:, :, None, None], some, 0.0).sum(axis=1)
    return total / jnp.maximum(counts.sum(axis=1), 1).astype(jnp.float32)[:, None, None]


def _reference(
    q: Rounded, k: Rounded, v: Rounded, counts: jax.Array, block: int | None, scale: float
) -> jax.Array:
    """The definition of correct: the rounded operands, everything else in float32.

    Online, some keys at a time, so that a long video fits into memory.
    """
    queries, keys, values = (x.values.astype(jnp.float32) * x.scales for x in (q, k, v))
    b, h, length, width = keys.shape
    more = -length % min(KEYS_AT_ONCE, length)
    parts = (length + more) // min(KEYS_AT_ONCE, length)
    keys = jnp.pad(keys, ((0, 0), (0, 0), (0, more), (0, 0)))
    keys = jnp.moveaxis(keys.reshape(b, h, parts, -1, width), 2, 0)
    values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, more)))
    values = jnp.moveaxis(values.reshape(b, h, width, parts, -1), 3, 0)
    counts = jnp.moveaxis(jnp.pad(counts, ((0, 0), (0, more))).reshape(b, parts, -1), 1, 0)
    at_once = keys.shape[3]
    positions = jnp.arange(parts * at_once).reshape(parts, at_once)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def one(state, part):
        totals, weights, highest = state
        keys, values, counts, positions = part
        scores = product("bhsd,bhld->bhsl", queries, keys) * scale
        seen = counts[:, None, None]
        if block is not None:
            of_query = jnp.arange(queries.shape[2]) // block
            seen = seen & ((positions // block)[None] <= of_query[:, None])[None, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        now = jnp.maximum(highest, scores.max(axis=-1))
        # Not yet any key: keep what there is, nothing.
        safe = jnp.where(now == -jnp.inf, 0.0, now)
        keep = jnp.exp(highest - safe)
        each = jnp.exp(scores - safe[..., None])
        totals = totals * keep[..., None] + product("bhsl,bhdl->bhsd", each, values)
        return (totals, weights * keep + each.sum(axis=-1), now), None

    zeros = jnp.zeros(queries.shape, jnp.float32)
    state = (zeros, zeros[..., 0], jnp.full(zeros.shape[:-1], -jnp.inf))
    (totals, weights, _), _ = jax.lax.scan(one, state, (keys, values, counts, positions))
    weights = weights[..., None]
    return jnp.swapaxes(jnp.where(weights == 0, 0.0, totals / weights), 1, 2)


def _check(
    q: jax.Array | Projected,
    k: jax.Array | Projected,
    v: jax.Array,
    fmt_qk: str | None,
    fmt_pv: str | None,
    mask: jax.Array | None,
    causal: int | None,
    scale: float | None,
) -> None:
    if q.ndim != 4:
        raise ValueError(f"q: expected [B, S, H, D], got {list(q.shape)}")
    expected = (q.shape[0], k.shape[1] if k.ndim == 4 else -1, *q.shape[2:])
    for name, x in (("k", k), ("v", v)):
        if x.shape != expected:
            raise ValueError(f"{name}: expected {list(expected)}, got {list(x.shape)}")
    if not k.shape[1]:
        raise ValueError("k: expected at least one key")
    if causal is not None and causal < 1:
        raise ValueError(f"causal: expected at least one token in a block, got {causal}")
    if causal is not None and k.shape[1] != q.shape[1]:
        raise ValueError(
            f"causal: expected as many keys as queries, {q.shape[1]}, got {k.shape[1]}"
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected more than 0, got {scale}")
    for name, fmt in (("fmt_qk", fmt_qk), ("fmt_pv", fmt_pv)):
        if fmt is not None and formats.parse(fmt).family != "dialect":
            raise ValueError(f"{name}: expected a dialect format or None, got {fmt!r}")
    if mask is not None and (mask.shape != expected[:2] or mask.dtype != jnp.bool_):
        raise ValueError(
            f"mask: expected bool{list(expected[:2])}, got {mask.dtype}{list(mask.shape)}"
        )
