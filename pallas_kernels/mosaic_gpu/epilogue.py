"""How a product becomes a result: scaled, shifted, rounded and turned from [N, M] to [M, N]."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.memory import load

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

    y = sums if x_scale is None else sums * _along(x_scale, 1, sums)
    y = y * _along(w_scale, 0, sums)
    return activation(y if bias is None else y + _along(bias, 0, sums))


def added(onto: jax.Array, y: jax.Array, gate: jax.Array) -> jax.Array:
    """onto + gate y, float32 `[N, M]` in `plgpu.Layout.WGMMA`; gate `[N]` in BY_W."""
    return onto.astype(jnp.float32) + y * _along(gate, 0, y)


def _along(x: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    axes = tuple(range(like.ndim))[axis : axis + x.ndim]
    return lax.broadcast_in_dim(x, like.shape, axes)


def load_transposed(ref: Any) -> jax.Array:
    """What shared memory `[M, N]` holds, as `[N, M]` in `plgpu.Layout.WGMMA`."""
    return load(ref.T, plgpu.Layout.WGMMA)  # 16-bit numbers, transposed on their way (ldmatrix)


def store_transposed(ref: Any, y: jax.Array) -> None:
    """Write y `[N, M]`, in `plgpu.Layout.WGMMA`, to shared memory `[M, N]` of its dtype."""
    if jnp.dtype(y.dtype).itemsize != 2:  # 16-bit numbers are transposed on their way (stmatrix)
        y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
    ref.T[...] = y
