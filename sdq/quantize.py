"""quantize, dequantize and their relatives: one array to a QTensor and back. The public functions.

Pure and jit-able; all work under jit, vmap, scan, `jax.eval_shape` and sharded inputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from sdq import formats, qtensor
from sdq import select as selection
from sdq.codecs import codec, dialect
from sdq.formats import Format
from sdq.qtensor import QTensor

INPUT_DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_RULE = "exhaustive"


def quantize(
    x: jax.Array,
    fmt: str | Format,
    *,
    axis: int = -1,
    select: str | None = None,
    importance: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> QTensor:
    """Quantise an array in blocks along one axis.

    Args:
      x: float array of rank >= 1 (float32, bfloat16 or float16). Axes other than `axis` are rows:
        each keeps its own scales. A row with NaN or Inf dequantises to NaN throughout.
      fmt: a Format or its name; `sdq formats` lists them.
      axis: the contraction axis of the product that x is for. Padded to whole blocks inside.
      select: how blocks choose their dialect: "exhaustive" (default), "lut", "two_stage",
        "blockdialect". Only for formats with a choice.
      importance: finite weights >= 0 of the elements' squared errors in that choice: `[K]`, or
        broadcastable to x.
      allowed: a sub-formatbook for each row or block, uint8 `[*rows, 1 or G, 8]` bit masks of the
        shapes that each top may take; rows are the axes of x without `axis`. Only for "two_stage".
    Returns:
      A QTensor with `.shape == x.shape`.
    Raises:
      ValueError: naming the argument, what came and what was expected.

    >>> q = quantize(jnp.ones((4, 64)), "sdq32:16")
    >>> q.shape, q.nbytes
    ((4, 64), 148)
    """
    fmt = formats.parse(fmt)
    x = _checked_array(x)
    axis = _checked_axis(axis, x.ndim)
    rule = checked_rule(select, fmt)
    if importance is not None:
        importance = _checked_importance(importance, x, axis, fmt)
    if allowed is not None:
        _check_allowed(allowed, x, axis, rule, fmt)
    return _quantize(x, importance, allowed, fmt=fmt, axis=axis, rule=rule)


def dequantize(q: QTensor, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """The array that a QTensor stands for, of `q.shape`.

    Computed in float32 and cast to `dtype` (default: the dtype that was quantised); values beyond
    the dtype's range saturate, NaN stays NaN.
    """
    return _dequantize(_checked_qtensor(q), np.dtype(dtype or q.dtype))


def fake_quantize(
    x: jax.Array,
    fmt: str | Format,
    *,
    axis: int = -1,
    select: str | None = None,
    importance: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """dequantize(quantize(x)) whose derivative is the identity (straight-through).

    Arguments as in `quantize`. Use this where a gradient must pass: a QTensor holds integers, so
    plain `dequantize(quantize(x))` has derivative zero.
    """

    @jax.custom_jvp
    def through(x):
        q = quantize(x, fmt, axis=axis, select=select, importance=importance, allowed=allowed)
        return dequantize(q)

    through.defjvp(lambda primals, tangents: (through(*primals), tangents[0]))
    return through(x)


def to_fp8(q: QTensor) -> tuple[jax.Array, jax.Array]:
    """A dialect QTensor as fp8 numbers and one power of two a row, without any rounding.

    Returns:
      values: float8_e4m3fn, the quantised axis last: `[*lead, K]`.
      exponents: int8 `[*lead, 1]`, with `dequantize(q) == values * 2.0**exponents` up to that axis
        order. A row that held NaN or Inf has NaN values (its exponent, -128, means nothing).
    Raises:
      ValueError: the format's values are not fp8 numbers times a power of two.
    """
    if _checked_qtensor(q).format.family != "dialect":
        raise ValueError(
            f"to_fp8: {q.format} values are not e4m3 numbers times one power of two a row; "
            "use a dialect format (sdq32, dialectfp4, e2m1)"
        )
    return _to_fp8(q)


@functools.partial(jax.jit, static_argnames=("fmt", "axis", "rule"))
def _quantize(x, importance, allowed, *, fmt: Format, axis: int, rule: str) -> QTensor:
    if importance is not None:
        importance = blocked(importance, axis, fmt)
    choice = selection.Choice(rule, importance, allowed)
    encoded = codec(fmt).encode(blocked(x.astype(jnp.float32), axis, fmt), fmt, choice)
    return qtensor.pack(encoded, fmt=fmt, length=x.shape[axis], axis=axis, dtype=x.dtype)


@functools.partial(jax.jit, static_argnames=("dtype",))
def _dequantize(q: QTensor, dtype: np.dtype) -> jax.Array:
    values = qtensor.joined(codec(q.format).decode(qtensor.unpack(q), q.format))
    values = values[..., : q.length]
    limit = float(jnp.finfo(dtype).max)
    values = jnp.clip(values, -limit, limit)
    return jnp.moveaxis(values.astype(dtype), -1, q.axis)


@jax.jit
def _to_fp8(q: QTensor) -> tuple[jax.Array, jax.Array]:
    values, exponents = dialect.decode_fp8(qtensor.unpack(q), q.format)
    return qtensor.joined(values)[..., : q.length], exponents


def blocked(x: jax.Array, axis: int, fmt: Format) -> jax.Array:
    """`[..., K, ...]` -> `[*lead, G, block]`, zeros beyond K."""
    if axis != -1:
        # Transposed once, not on each of the many reads that a choice makes (2x on CPUs).
        x = with_layout_constraint(
            jnp.moveaxis(x, axis, -1), Layout(major_to_minor=tuple(range(x.ndim)))
        )
    groups, block = qtensor.blocks_of(x.shape[-1], fmt)
    if missing := groups * block - x.shape[-1]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], groups, block)


def _checked_array(x) -> jax.Array:
    dtype = getattr(x, "dtype", None)
    if dtype is None or np.dtype(dtype).name not in INPUT_DTYPES:
        got = type(x).__name__ if dtype is None else f"dtype {np.dtype(dtype).name}"
        raise ValueError(f"x: expected an array of {', '.join(INPUT_DTYPES)}, got {got}")
    if len(x.shape) < 1:
        raise ValueError("x: expected rank >= 1, got a scalar")
    return jnp.asarray(x)


def _checked_axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis: expected in [{-ndim}, {ndim - 1}] for rank {ndim}, got {axis}")
    return axis - ndim if axis >= 0 else axis


def checked_rule(select: str | None, fmt: Format) -> str:
    """The rule to use; raises ValueError where `select` is unknown or does not fit the format."""
    if select is None:
        return DEFAULT_RULE
    if select not in selection.RULES:
        raise ValueError(f"select: expected one of {', '.join(selection.RULES)}, got {select!r}")
    if not fmt.has_choice:
        raise ValueError(f"select: {fmt} has nothing to choose; leave select out, got {select!r}")
    if select == "blockdialect" and fmt.book != "dialectfp4":
        raise ValueError(f"select: 'blockdialect' is for dialectfp4:<block>, got {fmt}")
    return select


def _checked_importance(importance, x, axis: int, fmt: Format) -> jax.Array:
    if not fmt.has_choice:
        raise ValueError(f"importance: {fmt} has no choice that importance could weigh")
    importance = jnp.asarray(importance, jnp.float32)
    known = not isinstance(importance, jax.core.Tracer)
    if known and not bool(jnp.all((importance >= 0) & jnp.isfinite(importance))):
        raise ValueError("importance: expected finite weights >= 0")
    if importance.shape == (x.shape[axis],):
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        importance = importance.reshape(shape)
    try:
        return jnp.broadcast_to(importance, x.shape)
    except ValueError:
        raise ValueError(
            f"importance: expected [{x.shape[axis]}] or broadcastable to {x.shape}, "
            f"got {importance.shape}"
        ) from None


def _check_allowed(allowed: jax.Array, x: jax.Array, axis: int, rule: str, fmt: Format) -> None:
    if rule != "two_stage":
        raise ValueError(f"allowed: needs select='two_stage', got {rule!r}")
    rows = list(x.shape)
    del rows[axis]
    blocks, _ = qtensor.blocks_of(x.shape[axis], fmt)
    fits = allowed.shape in ((*rows, 1, 8), (*rows, blocks, 8))
    if not fits or allowed.dtype != jnp.uint8:
        raise ValueError(
            f"allowed: expected uint8{[*rows, f'1 or {blocks}', 8]}".replace("'", "")
            + f", got {allowed.dtype}{list(allowed.shape)}"
        )


def _checked_qtensor(q) -> QTensor:
    if not isinstance(q, QTensor):
        raise ValueError(f"q: expected a QTensor, got {type(q).__name__}")
    return q
