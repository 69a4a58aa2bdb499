"""The definition of correct: dequantise both operands, multiply in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.rows import Fp8Rows, numbers
from sdq import QTensor, dequantize

ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda y: y,
    "gelu": lambda y: jax.nn.gelu(y, approximate=True),
}


def matmul(
    x: jax.Array | QTensor | Fp8Rows,
    w: QTensor,
    bias: jax.Array | None,
    activation: str | None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """What `api.quantized_matmul` computes."""
    rows, kernel = _numbers(x), jnp.moveaxis(dequantize(w, jnp.float32), w.axis, -1)
    y = jax.lax.dot_general(
        rows,
        kernel,
        (((rows.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    return finished(y, bias, activation, out_dtype)


def finished(
    y: jax.Array,
    bias: jax.Array | None,
    activation: str | None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """A float32 product `[..., N]` plus bias, through the activation, rounded once."""
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return ACTIVATIONS[activation](y).astype(out_dtype)


def _numbers(x: jax.Array | QTensor | Fp8Rows) -> jax.Array:
    if isinstance(x, QTensor):
        return dequantize(x, jnp.float32)
    if isinstance(x, Fp8Rows):
        return numbers(x)
    return x.astype(jnp.float32)
