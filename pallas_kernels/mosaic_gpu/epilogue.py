"""How a product becomes a result: scaled, shifted, rounded and turned from [N, M] to [M, N]."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

BY_W = plgpu.Layout.WGMMA.reduce(1)  # layouts of what there is one of for each row of w
BY_X = plgpu.Layout.WGMMA.reduce(0)  # and of x


def finished(
    sums: jax.Array,
    x_scale: jax.Array | None,
    w_scale: jax.Array,
    bias: jax.Array | None,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """activation(sums w_scale x_scale + bias), float32 `[N, M]` in `plgpu.Layout.WGMMA`, or `[N]`.

    Args:
      sums: of products, `[N, M]` in that layout; or `[N]` in BY_W, of one row of x.
      x_scale: `[M]` in BY_X, or `[]`; None for ones.
      w_scale: `[N]` in BY_W.
      bias: likewise, or None.
      activation: of single numbers.
    """

    def of_all(x: jax.Array, axis: int) -> jax.Array:
        axes = tuple(range(sums.ndim))[axis : axis + x.ndim]
        return lax.broadcast_in_dim(x, sums.shape, axes)

    y = sums if x_scale is None else sums * of_all(x_scale, 1)
    y = y * of_all(w_scale, 0)
    return activation(y if bias is None else y + of_all(bias, 0))


def store_transposed(ref: Any, y: jax.Array) -> None:
    """Write y `[N, M]`, in `plgpu.Layout.WGMMA`, to shared memory `[M, N]` of its dtype."""
    if jnp.dtype(y.dtype).itemsize != 2:  # 16-bit numbers are transposed on their way (stmatrix)
        y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
    ref.T[...] = y
