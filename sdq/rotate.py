"""Hadamard rotations: outliers of single channels spread over groups of channels.

x W = (x H) (H^T W) for an orthogonal H, so rotating a linear's inputs and its kernel changes
nothing but how hard both are to quantise. H is block-diagonal: one normalised Hadamard matrix for
each group of channels, applied in log2(group) additions an element.
"""

import functools

import jax
import jax.numpy as jnp


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
    width = x.shape[axis]
    moved = jnp.moveaxis(x, axis, -1)
    y = moved.astype(jnp.float32).reshape(*moved.shape[:-1], width // group, group)
    span = 1
    while span < group:
        pairs = y.reshape(*y.shape[:-1], group // (2 * span), 2, span)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([first + second, first - second], axis=-2).reshape(y.shape)
        span *= 2
    y = (y * group**-0.5).reshape(moved.shape)
    return jnp.moveaxis(y.astype(x.dtype), -1, axis)
