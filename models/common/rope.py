"""Tables of rotary position embedding over time, height and width, on interleaved pairs."""

import jax
import jax.numpy as jnp
import numpy as np


def rope_table(
    grid: tuple[int, int, int], widths: tuple[int, int, int], theta: float
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for every token of a grid, computed in float64.

    Args:
      grid: tokens along (t, h, w); tokens are numbered with t slowest.
      widths: how the head's width is split over (t, h, w), each even.
      theta: base of the frequencies.
    Returns:
      Two float32 arrays `[t * h * w, sum(widths) / 2]`.
    """
    angles = []
    for axis, (count, width) in enumerate(zip(grid, widths, strict=True)):
        frequency = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        angle = np.arange(count, dtype=np.float64)[:, None] * frequency
        shape = [1, 1, 1, len(frequency)]
        shape[axis] = count
        angles.append(np.broadcast_to(angle.reshape(shape), (*grid, len(frequency))))
    angle = np.concatenate(angles, axis=-1).reshape(-1, sum(widths) // 2)
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
