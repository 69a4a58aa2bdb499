"""Hadamard rotations: outliers of single channels spread over groups of channels.

x W = (x H) (H^T W) for an orthogonal H, so rotating a linear's inputs and its kernel changes
nothing but how hard both are to quantise. H is block-diagonal: one normalised Hadamard matrix for
each group of channels. It is applied as one or two small matrix products: log2(group) rounds of
additions are fewer operations, but each would pass over memory, in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

AT_ONCE = 128  # channels of a product


def largest_group(width: int, limit: int = 1024) -> int:
    """The largest power of two up to `limit` that divides a width."""
    if width < 1:
        raise ValueError(f"width: expected a number from 1 up, got {width}")
    return min(width & -width, limit)


def hadamard(x: jax.Array, group: int, axis: int = -1) -> jax.Array:
    """Rotate each group of channels; its own inverse.

    Args:
      x: floats; computed in float32 and returned in x's dtype.
      group: channels of one rotation, a power of two that divides the axis.
      axis: of the channels: -1 for inputs `[..., K]`, -2 for kernels `[..., K, N]`.
    """
    width = x.shape[axis]
    if group < 1 or group & (group - 1) or width % group:
        raise ValueError(f"group: expected a power of two that divides {width}, got {group}")
    return _rotated(x, group, axis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rotated(x: jax.Array, group: int, axis: int) -> jax.Array:
    moved = jnp.moveaxis(x, axis, -1)
    inner = min(group, AT_ONCE)
    y = moved.reshape(*moved.shape[:-1], -1, group // inner, inner)
    y = _multiplied(y, _signs(inner), "...i,ij->...j")
    if group > inner:  # the matrix is the Kronecker product of two smaller ones
        y = _multiplied(y, _signs(group // inner), "...ki,kl->...li")
    y = (y * group**-0.5).reshape(moved.shape)
    return jnp.moveaxis(y.astype(x.dtype), -1, axis)


def _multiplied(x: jax.Array, signs: np.ndarray, how: str) -> jax.Array:
    """A product that is exact but for its float32 sums: ones of both signs are bf16 numbers too."""
    return jnp.einsum(
        how,
        x,
        jnp.asarray(signs, x.dtype),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _signs(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix: an odd number of common ones in both indices is a minus."""
    common = np.arange(size)[:, None] & np.arange(size)
    return 1 - 2 * (np.bitwise_count(common) & 1).astype(np.int8)
