"""Fit drawn shapes to masks: for every frame and kind of shape the centre and radius that match.

A few Gauss-Newton steps on the anti-aliased coverage that the renderer draws. Pixels that another
thing may hide do not count, so that a partly hidden thing is still found where it is.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from models.shapes.render import coverage
from models.shapes.vocabulary import SHAPES
from models.shapes.world import WIDTH

SOFTNESS = (6.0, 5.0, 4.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0)  # edge widths of the steps, in pixels
LONGEST_STEP = 3.0  # pixels, or e^0.3 in radius
DAMPING = 1e-3  # of the normal equations, relative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fit:
    """Leading axes are those of the masks, then one for the kinds of shape.

    Attributes:
      centre: `[..., shapes, 2]`, (x, y) in pixels.
      radius: `[..., shapes]`.
      missed: `[..., shapes]`, difference between drawn and seen, in pixels of area.
      drawn: `[..., shapes]`, visible area of the drawn shape.
      found: `[..., shapes]`, how much of it the mask shows.
    """

    centre: jax.Array
    radius: jax.Array
    missed: jax.Array
    drawn: jax.Array
    found: jax.Array


def fit_shapes(mask: jax.Array, visible: jax.Array) -> Fit:
    """Fit every kind of shape to one mask.

    Args:
      mask: float32 `[WIDTH, WIDTH]`, how much of a pixel shows the thing.
      visible: float32 `[WIDTH, WIDTH]`, 0 where something else may hide it.
    """
    pixel = np.arange(WIDTH, dtype=np.float32) + 0.5
    area = jnp.maximum(mask.sum(), 1e-3)
    middle = jnp.stack([(mask * pixel[None]).sum(), (mask * pixel[:, None]).sum()]) / area

    def one(kind: jax.Array) -> Fit:
        unit = coverage(jnp.full(2, WIDTH / 2), jnp.float32(10.0), kind).sum() / 100
        guess = jnp.append(middle, jnp.log(jnp.sqrt(area / unit)))

        def step(where: jax.Array, softness: jax.Array) -> tuple[jax.Array, None]:
            def drawn(where: jax.Array) -> jax.Array:
                return coverage(where[:2], jnp.exp(where[2]), kind, softness)

            error = (mask - drawn(where)) * visible
            slopes = jax.jacfwd(drawn)(where) * visible[..., None]
            normal = jnp.einsum("hwi,hwj->ij", slopes, slopes, precision="highest")
            force = jnp.einsum("hwi,hw->i", slopes, error, precision="highest")
            trust = DAMPING * (normal[0, 0] + normal[1, 1]) + 1e-3
            move = _solve3(normal + trust * jnp.eye(3), force)
            longest = jnp.array([LONGEST_STEP, LONGEST_STEP, LONGEST_STEP / 10])
            moved = where + jnp.clip(move, -longest, longest)
            low, high = jnp.array([-8.0, -8.0, 0.0]), jnp.array([WIDTH + 8.0, WIDTH + 8.0, 3.7])
            return jnp.clip(moved, low, high), None

        where, _ = jax.lax.scan(step, guess, jnp.array(SOFTNESS))
        drawn = coverage(where[:2], jnp.exp(where[2]), kind)
        return Fit(
            centre=where[:2],
            radius=jnp.exp(where[2]),
            missed=(jnp.abs(mask - drawn) * visible).sum(),
            drawn=(drawn * visible).sum(),
            found=(jnp.minimum(mask, drawn) * visible).sum(),
        )

    return jax.vmap(one)(jnp.arange(len(SHAPES)))


def _solve3(a: jax.Array, b: jax.Array) -> jax.Array:
    """Solve a symmetric positive 3 x 3 system by Cramer's rule: no library call per pixel mask."""
    columns = [
        jnp.cross(a[:, 1], a[:, 2]),
        jnp.cross(a[:, 2], a[:, 0]),
        jnp.cross(a[:, 0], a[:, 1]),
    ]
    determinant = a[:, 0] @ columns[0]
    return jnp.stack([column @ b for column in columns]) / determinant
