"""quantize_rows: activations to fp8 rows, by the fused kernel or in plain jnp; the same bits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.deferred import Activated, Concatenated, Deferred, Normed, computed
from pallas_kernels.rows import Fp8Rows, fp8_rows, numbers
from sdq import formats, quantize, seda
from sdq.formats import Format

IMPLEMENTATIONS = ("mosaic_gpu", "reference")  # the first that fits is taken


class Quantized(NamedTuple):
    """What became of rows.

    Attributes:
      rows: Q(x), of x's shape.
      residual: Q(x - Q(x)) of some tokens, `[B, n, K]`, or None.
    """

    rows: Fp8Rows
    residual: Fp8Rows | None


def quantize_rows(
    x: jax.Array | Deferred,
    fmt: str | Format,
    *,
    sub_formatbooks: tuple[jax.Array, jax.Array] | None = None,
    tokens: jax.Array | None = None,
    implementation: str | None = None,
) -> Quantized:
    """Quantise activations along their last axis, blocks choosing their dialect in two stages.

    Args:
      x: bf16 or float32 `[B, S, K]`; "mosaic_gpu" takes bf16. What is deferred is computed on the
        way there, which may move single numbers to a neighbour: "reference" sums and approximates
        otherwise.
      fmt: a dialect format.
      sub_formatbooks: of `seda.sub_formatbooks`, and the group of each token `[B, S]`.
      tokens: of which the residual is wanted, int32 `[B, n]`.
      implementation: one of IMPLEMENTATIONS; None takes the first that fits.
    Raises:
      ValueError: operands that no implementation takes, or that the one asked for does not.
    """
    fmt = formats.parse(fmt)
    refused = {name: supports(name, x, fmt) for name in IMPLEMENTATIONS}
    fitting = [name for name, reason in refused.items() if reason is None]
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation: expected one of {known}, got {implementation!r}")
    if implementation not in (None, *fitting) or not fitting:
        asked = {implementation: refused[implementation]} if implementation else refused
        raise ValueError(f"quantize_rows: cannot do this: {asked}")
    chosen = implementation or fitting[0]
    call = _mosaic_gpu if chosen == "mosaic_gpu" else _reference
    return call(x, fmt, sub_formatbooks, tokens)


def supports(implementation: str, x: jax.Array | Deferred, fmt: Format) -> str | None:
    """Why an implementation cannot quantise x so here; None if it can."""
    if fmt.family != "dialect":
        return f"{fmt} numbers are not fp8 numbers times a power of two a row"
    if implementation == "reference":
        return None
    if reason := device.without_mosaic_gpu():
        return reason
    from pallas_kernels.mosaic_gpu.quantizer import misfit  # takes a second to import

    if x.dtype != jnp.bfloat16:
        return f"x: expected bfloat16, got {x.dtype}"
    return misfit(fmt, x.shape[-1])


def _reference(
    x: jax.Array | Deferred,
    fmt: Format,
    sub_formatbooks: tuple[jax.Array, jax.Array] | None,
    tokens: jax.Array | None,
) -> Quantized:
    x = computed(x)
    select = "two_stage" if fmt.has_choice else None
    allowed = None if sub_formatbooks is None else seda.allowed(*sub_formatbooks)
    rows = fp8_rows(quantize(x, fmt, select=select, allowed=allowed))
    if tokens is None:
        return Quantized(rows, None)
    parts = x.astype(jnp.float32), numbers(rows)
    before, after = (jnp.take_along_axis(part, tokens[..., None], axis=1) for part in parts)
    left = quantize((before - after).astype(x.dtype), fmt, select=select)
    return Quantized(rows, fp8_rows(left))


def _mosaic_gpu(
    x: jax.Array | Deferred,
    fmt: Format,
    sub_formatbooks: tuple[jax.Array, jax.Array] | None,
    tokens: jax.Array | None,
) -> Quantized:
    from pallas_kernels.mosaic_gpu import quantizer as kernel

    batch, length, width = x.shape
    norm = activation = more = None
    if isinstance(x, Activated):
        activation, x = x.activation, x.x
    elif isinstance(x, Concatenated) and not x.x.shape[-1] % kernel.STEP:
        more, x = x.more.reshape(batch * length, -1), x.x
    elif isinstance(x, Normed) and x.gain.shape[1] == 1:
        gain, shift = (jnp.broadcast_to(part[:, 0], (batch, width)) for part in (x.gain, x.shift))
        norm, x = kernel.Norm(gain, shift, x.eps), x.x
    sub = None
    if sub_formatbooks is not None:
        books, group = sub_formatbooks
        groups = books.shape[1]
        first = jnp.arange(batch, dtype=jnp.int32)[:, None] * groups
        sub = kernel.SubFormatbooks(
            books.reshape(batch * groups, *books.shape[2:]), (group + first).reshape(-1)
        )
    residual_of = None
    if tokens is not None:
        first = jnp.arange(batch, dtype=jnp.int32)[:, None] * length
        residual_of = (tokens + first).reshape(-1)
    flat = computed(x)
    found = kernel.quantize(
        flat.reshape(batch * length, flat.shape[-1]),
        fmt,
        more=more,
        sub_formatbooks=sub,
        residual_of=residual_of,
        norm=norm,
        activation=activation,
        num_sms=device.current().cores,
    )
    return jax.tree.map(
        lambda part: part.reshape(batch, -1, part.shape[-1]),
        Quantized(found.rows, found.residuals),
    )
