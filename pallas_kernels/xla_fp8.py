"""Both operands as fp8 numbers, multiplied by XLA: on a GPU, by its library's fp8 product.

Reads the weights as 8-bit numbers, so it moves twice the bytes, and rounds sums as the tensor cores
do. The yardstick for kernels that decode.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.reference import finished
from pallas_kernels.rows import Fp8Rows, deinterleave, row_scales
from sdq import QTensor, to_fp8


def matmul(
    x: Fp8Rows,
    w: QTensor,
    bias: jax.Array | None,
    activation: str | None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """What `api.quantized_matmul` computes."""
    kernel, exponents = to_fp8(w)
    values = deinterleave(x.values) if x.interleaved else x.values
    y = jax.lax.dot_general(
        values,
        kernel,
        (((values.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    columns = row_scales(exponents, bad=jnp.nan).reshape((1,) * (y.ndim - 1) + (-1,))
    return finished(y * row_scales(x.exponents, bad=1.0) * columns, bias, activation, out_dtype)
