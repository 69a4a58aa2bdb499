"""Scenes to pixels, with ground truth for every pixel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from models.shapes.vocabulary import BACKGROUNDS, SHAPES
from models.shapes.world import PATTERN, WIDTH, Scene, tracks

# Things are bright (largest channel at least 0.9), backgrounds the same hues but dark.
PALETTE = np.array(
    [
        (0.95, 0.16, 0.16),  # red
        (1.00, 0.55, 0.10),  # orange
        (0.98, 0.92, 0.20),  # yellow
        (0.20, 0.90, 0.30),  # green
        (0.15, 0.90, 0.95),  # cyan
        (0.20, 0.35, 1.00),  # blue
        (0.72, 0.25, 0.95),  # purple
        (0.96, 0.96, 0.96),  # white
    ],
    np.float32,
)
DARK, LIGHT = 0.18, 0.42  # tones of a background, times the palette's colour
CELL = 8  # pixels of a square of the checkerboard
STRIPE = 4  # pixels of a stripe of the curtain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clip:
    """A rendered scene.

    Attributes:
      video: float32 `[FRAMES, WIDTH, WIDTH, 3]` in [0, 1].
      masks: float32 `[FRAMES, 2, WIDTH, WIDTH]`, how much of a pixel shows each thing.
      centres: float32 `[FRAMES, 2, 2]`, (x, y) in pixels.
      radii: float32 `[FRAMES, 2]`.
    """

    video: jax.Array
    masks: jax.Array
    centres: jax.Array
    radii: jax.Array


def render(scene: Scene) -> Clip:
    """Draw a scene, anti-aliased."""
    centres, radii = tracks(scene)
    frames = jax.vmap(jax.vmap(coverage, (0, 0, 0)), (0, 0, None))
    covered = frames(centres, radii, scene.shape)
    front = covered[:, 0]
    back = jnp.where(scene.count == 2, covered[:, 1], 0) * (1 - front)
    masks = jnp.stack([front, back], axis=1)
    colours = jnp.asarray(PALETTE)[scene.colour]
    video = jnp.einsum("fthw,tc->fhwc", masks, colours, precision="highest")
    behind = (1 - front - back)[..., None] * background(scene)[None]
    return Clip(video + behind, masks, centres, radii)


def background(scene: Scene) -> jax.Array:
    """Float32 `[WIDTH, WIDTH, 3]`."""
    x, y = (jnp.arange(WIDTH) + scene.pattern[axis] for axis in (0, 1))
    squares = (x[None] // CELL + y[:, None] // CELL) % 2
    stripes = jnp.broadcast_to(x[None] // STRIPE % 2, squares.shape)
    ramp = jnp.broadcast_to(jnp.linspace(0.0, 1.0, WIDTH)[:, None], squares.shape)
    ramp = jnp.where(scene.pattern[1] < PATTERN // 2, ramp, 1 - ramp)
    light = {
        "wall": jnp.full(squares.shape, 0.6),
        "checkerboard": squares.astype(jnp.float32),
        "curtain": stripes.astype(jnp.float32),
        "gradient": ramp,
    }
    tone = DARK + (LIGHT - DARK) * jnp.stack([light[name] for name in BACKGROUNDS])
    colour = jnp.asarray(PALETTE)[scene.background_colour]
    return tone[scene.background][..., None] * colour[None, None]


def coverage(
    centre: jax.Array, radius: jax.Array, shape: jax.Array, softness: float | jax.Array = 1.0
) -> jax.Array:
    """How much of each pixel a shape covers, float32 `[WIDTH, WIDTH]`.

    Args:
      centre: `[2]`, (x, y); pixel i spans [i, i + 1].
      radius: half-extent.
      shape: place in SHAPES.
      softness: width of the edge in pixels.
    """
    pixel = jnp.arange(WIDTH, dtype=jnp.float32) + 0.5
    x, y = pixel[None, :] - centre[0], pixel[:, None] - centre[1]
    return jnp.clip(0.5 - distances(x, y, radius)[shape] / softness, 0, 1)


def distances(x: jax.Array, y: jax.Array, radius: jax.Array) -> jax.Array:
    """Signed distance in pixels from the edge of every shape, `[shapes, H, W]`; inside negative."""
    from_centre = jnp.sqrt(x**2 + y**2 + 1e-12)  # differentiable at the centre
    wide, high = jnp.abs(x), jnp.abs(y)
    slope = np.float32(np.sqrt(3) / 2)
    arm = 0.34 * radius
    by_shape = {
        "circle": from_centre - radius,
        "square": jnp.maximum(wide, high) - 0.85 * radius,
        "triangle": jnp.maximum(y, slope * wide - y / 2) - 0.55 * radius,
        "cross": jnp.minimum(
            jnp.maximum(wide - radius, high - arm), jnp.maximum(high - radius, wide - arm)
        ),
        "ring": jnp.abs(from_centre - 0.72 * radius) - 0.24 * radius,
    }
    return jnp.stack([jnp.broadcast_to(by_shape[name], (WIDTH, WIDTH)) for name in SHAPES])


def flow(centres: jax.Array, radii: jax.Array, masks: jax.Array) -> jax.Array:
    """Where what a pixel shows goes until the next frame.

    Args:
      centres: `[FRAMES, 2, 2]`.
      radii: `[FRAMES, 2]`.
      masks: `[FRAMES, 2, WIDTH, WIDTH]`.
    Returns:
      Float32 `[FRAMES - 1, WIDTH, WIDTH, 2]`, (x, y) in pixels; 0 on the background.
    """
    pixel = np.arange(WIDTH, dtype=np.float32) + 0.5
    grid = jnp.stack(jnp.meshgrid(pixel, pixel), axis=-1)[None, None]  # (x, y)
    now, then = centres[:-1, :, None, None], centres[1:, :, None, None]
    growth = (radii[1:] / jnp.maximum(radii[:-1], 1e-3))[..., None, None, None]
    moved = then + growth * (grid - now) - grid
    shown = masks[:-1, ..., None] > 0.5
    return jnp.where(shown, moved, 0).sum(axis=1)


def static_pixels(masks: jax.Array, margin: int = 2) -> jax.Array:
    """Pixels that show background in every frame, `margin` pixels from any thing: bool `[H, W]`."""
    seen = masks.max(axis=(0, 1))
    size = (2 * margin + 1,) * 2
    return jax.lax.reduce_window(seen, -jnp.inf, jax.lax.max, size, (1, 1), "SAME") < 0.05
