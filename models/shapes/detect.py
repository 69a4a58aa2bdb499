"""Detectors: what a clip shows, from its pixels alone, in the vocabulary of captions.

Brightness separates things from background; the two most frequent bright colours are the things;
drawn shapes are fitted to each (`fit.py`); tracks and radii over time give size and motion.
-1 stands for "none of the vocabulary", so a broken clip is never given an attribute.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from models.shapes.fit import fit_shapes
from models.shapes.render import CELL, DARK, LIGHT, PALETTE, STRIPE
from models.shapes.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES
from models.shapes.world import FRAMES, GROWTH, PATTERN, RADII, WIDTH, Scene

BRIGHT = 0.8  # a pixel that is surely a thing's
DIM = 0.45  # a pixel that is surely background
FULL = 0.92  # brightness of a pixel that a thing covers whole
THING_AREA = 14.0  # bright pixels of a frame, on average, that make a thing
THIRD_AREA = 25.0  # that make a third one: where two things meet, their colours mix
SEEN = 0.6  # of the visible shape must be there, in every frame
SEEN_AREA = 10.0  # pixels of a shape that must be visible to judge a frame
MISMATCH = 0.4  # between shape and mask, of the shape's area, at most
UNSURE = 0.1  # added to the mismatch where hidden pixels were left out
STILL = 1.5  # pixels of standard deviation
WAY = 12.0  # pixels that a move covers at least
STRAIGHT = 2.5  # pixels off the line or circle
SIDEWAYS = 0.35  # of a motion along one axis may be across it
TURN = np.pi  # that an orbit completes at least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Detection:
    """What was found; the two things in order of area, -1 for an attribute that does not fit.

    Attributes:
      count: int32 `[]`, things found; 3 stands for more than two.
      colour, shape, size, motion: int32 `[2]`.
      whole: bool `[2]`, whether the thing is there in every frame.
      background, background_colour: int32 `[]`.
      masks: float32 `[FRAMES, 2, WIDTH, WIDTH]`.
      centres: float32 `[FRAMES, 2, 2]`.
      radii: float32 `[FRAMES, 2]`.
    """

    count: jax.Array
    colour: jax.Array
    shape: jax.Array
    size: jax.Array
    motion: jax.Array
    whole: jax.Array
    background: jax.Array
    background_colour: jax.Array
    masks: jax.Array
    centres: jax.Array
    radii: jax.Array


@jax.jit
def detect(video: jax.Array) -> Detection:
    """Describe a clip float32 `[FRAMES, WIDTH, WIDTH, 3]`; noise and values beyond [0, 1] are fine.

    A clip that is not finite is described by -1 throughout.
    """
    finite = jnp.isfinite(video).all()
    video = jnp.where(finite, jnp.clip(video, 0, 1), 0)
    colour, count, masks = _things(video)
    first, second = masks[:, 0], masks[:, 1]
    hides = jnp.stack([_grown(second), _grown(first)], axis=1) > 0.1
    visible = 1 - (hides & (count > 1)).astype(jnp.float32)
    # Each thing as if it were in front, then as if the other may hide it.
    views = (jnp.ones_like(visible), visible)
    both = [jax.vmap(jax.vmap(fit_shapes))(masks, view) for view in views]
    fits = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *both)
    weight = (fits.drawn > SEEN_AREA).astype(jnp.float32)  # [FRAMES, 2, 2 shapes]
    mismatch = (fits.missed * weight).sum(0) / jnp.maximum((fits.drawn * weight).sum(0), 1e-3)
    mismatch = jnp.where(weight.sum(0) > FRAMES / 4, mismatch, jnp.inf)
    unsure = jnp.repeat(jnp.array([0.0, UNSURE]), len(SHAPES))[None]
    chosen = jnp.argmin(mismatch + unsure, axis=-1)
    shape = chosen % len(SHAPES)

    def best(values: jax.Array) -> jax.Array:
        index = chosen.reshape(1, 2, 1, *[1] * (values.ndim - 3))
        return jnp.take_along_axis(values, index, axis=2)[:, :, 0]

    weight, centres, radii = best(weight), best(fits.centre), best(fits.radius)
    seen = (best(fits.found) >= SEEN * best(fits.drawn)) & (weight > 0)
    # Behind another thing it may be out of sight for a while.
    missing = ((weight == 0) & (count > 1)).sum(axis=0)
    whole = (seen | (weight == 0)).all(axis=0) & ((weight > 0).sum(axis=0) + missing == FRAMES)
    one_size, growth = jax.vmap(_size, (1, 1))(radii, weight)
    there = finite & (jnp.arange(2) < count)
    known = lambda found: jnp.where(there, found, -1)  # noqa: E731
    background, background_colour = _background(video, masks)
    return Detection(
        count=jnp.where(finite, count, -1),
        colour=known(colour),
        shape=known(jnp.where(jnp.min(mismatch, axis=-1) < MISMATCH, shape, -1)),
        size=known(one_size),
        motion=known(jax.vmap(_motion, (1, 1, 0))(centres, weight, growth)),
        whole=there & whole & (missing <= FRAMES // 4),
        background=jnp.where(finite, background, -1),
        background_colour=jnp.where(finite, background_colour, -1),
        masks=masks,
        centres=centres,
        radii=radii,
    )


@jax.jit
def verdicts(scene: Scene, found: Detection) -> dict[str, jax.Array]:
    """Which attributes of the scene's caption the clip shows: bools `[]` by name.

    Things are matched by colour; an attribute is right if it is right for every thing. "motion"
    also wants the thing in every frame; "all" is all the others together.
    """
    count = scene.count
    wanted = jnp.arange(2) < count
    match = scene.colour[:, None] == found.colour[None, :]  # [wanted, found]
    which = jnp.argmax(match, axis=1)
    right = {
        "count": found.count == count,
        "colour": jnp.where(wanted, match.any(axis=1), True).all(),
    }
    for name in ("shape", "size", "motion"):
        same = (getattr(found, name)[which] == getattr(scene, name)) & match.any(axis=1)
        if name == "motion":
            same &= found.whole[which]
        right[name] = jnp.where(wanted, same, True).all()
    right["background"] = (found.background == scene.background) & (
        found.background_colour == scene.background_colour
    )
    right["all"] = jnp.stack(list(right.values())).all()
    return right


def _brightness(video: jax.Array) -> jax.Array:
    return video.max(axis=-1)


def _things(video: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Colours `[2]` by area, how many there are, and masks `[FRAMES, 2, WIDTH, WIDTH]`."""
    bright = _brightness(video)
    distance = jnp.square(video[..., None, :] - PALETTE[None, None, None]).sum(axis=-1)
    nearest = distance.argmin(axis=-1)
    counts = [((nearest == c) & (bright > BRIGHT)).sum() / FRAMES for c in range(len(COLOURS))]
    area, colour = jax.lax.top_k(jnp.stack(counts), 3)
    count = (area > jnp.array([THING_AREA, THING_AREA, THIRD_AREA])).sum()
    to_first, to_second = (jnp.take(distance, colour[i], axis=-1) for i in range(2))
    closer = jnp.where(to_first <= to_second, 1.0, -1.0)
    # The edge of a thing mixes with what is behind: it belongs to the sure pixels around it.
    sure = jnp.where(bright > BRIGHT, closer, 0)
    around = jax.lax.reduce_window(sure, 0.0, jax.lax.add, (1, 3, 3), (1, 1, 1), "SAME")
    vote = jnp.where((sure == 0) & (around != 0), around, closer)
    first = ((vote > 0) | (count < 2)).astype(jnp.float32)
    covered = _covered(bright)
    second = jnp.where(count > 1, 1 - first, 0)
    return colour[:2], count, jnp.stack([covered * first, covered * second], axis=1)


def _covered(bright: jax.Array) -> jax.Array:
    """How much of each pixel things cover, from brightness `[FRAMES, WIDTH, WIDTH]`.

    What is behind shows at a pixel when nothing covers it; where that never happens, because a
    thing rests there, it counts as the average of the others.
    """
    behind = jnp.sort(bright, axis=0)[FRAMES // 4][None]
    free = (behind < DIM).astype(jnp.float32)
    average = (free * behind).sum() / jnp.maximum(free.sum(), 1)
    behind = jnp.where(free > 0, behind, average)
    near = _grown((bright > BRIGHT).astype(jnp.float32))
    return near * jnp.clip((bright - behind) / (FULL - behind), 0, 1)


def _grown(mask: jax.Array) -> jax.Array:
    """A mask `[FRAMES, WIDTH, WIDTH]`, two pixels wider."""
    return jax.lax.reduce_window(mask, 0.0, jax.lax.max, (1, 5, 5), (1, 1, 1), "SAME")


def _size(radii: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Size and growth (log2 of last over first radius) from radii `[FRAMES]`."""
    time = jnp.linspace(-0.5, 0.5, FRAMES)
    level = jnp.log2(radii)
    middle, slope = _line(time, level, weight)
    known = np.log2(np.array(RADII))
    nearest = jnp.argmin(jnp.abs(middle - known))
    off = jnp.abs(middle - known).min()
    return jnp.where(off < (known[1] - known[0]) / 2, nearest, -1), slope


def _line(x: jax.Array, y: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted least squares: y at x = 0, and slope."""
    total = jnp.maximum(weight.sum(), 1e-6)
    x_mean, y_mean = (x * weight).sum() / total, (y * weight).sum() / total
    spread = jnp.maximum((weight * jnp.square(x - x_mean)).sum(), 1e-6)
    slope = (weight * (x - x_mean) * (y - y_mean)).sum() / spread
    return y_mean - slope * x_mean, slope


def _motion(centres: jax.Array, weight: jax.Array, growth: jax.Array) -> jax.Array:
    """Motion from a track `[FRAMES, 2]` and the growth of the radius."""
    time = jnp.linspace(-0.5, 0.5, FRAMES)
    total = jnp.maximum(weight.sum(), 1e-6)

    def rms(values: jax.Array) -> jax.Array:
        return jnp.sqrt((weight * jnp.square(values)).sum() / total)

    x, y = centres[:, 0], centres[:, 1]
    (x_mid, x_slope), (y_mid, y_slope) = _line(time, x, weight), _line(time, y, weight)
    x_mean, y_mean = (x * weight).sum() / total, (y * weight).sum() / total
    wide, high = rms(x - x_mean), rms(y - y_mean)
    still = (wide < STILL) & (high < STILL)
    off_line = jnp.maximum(rms(x - x_mid - x_slope * time), rms(y - y_mid - y_slope * time))
    along_x = high < SIDEWAYS * wide
    along_y = wide < SIDEWAYS * high
    straight = (off_line < STRAIGHT) & (jnp.maximum(jnp.abs(x_slope), jnp.abs(y_slope)) > WAY)

    centre, radius = _circle(x, y, weight)
    angle = jnp.arctan2(y - centre[1], x - centre[0])
    turned = jnp.mod(jnp.diff(angle) + jnp.pi, 2 * jnp.pi) - jnp.pi
    turned = (turned * weight[1:] * weight[:-1]).sum()
    round_ = rms(jnp.hypot(x - centre[0], y - centre[1]) - radius) < STRAIGHT

    grows = jnp.log2(GROWTH) / 2
    conditions = {
        "grows steadily": still & (growth > grows),
        "shrinks steadily": still & (growth < -grows),
        "stays still": still & (jnp.abs(growth) < grows),
        "moves left": straight & along_x & (x_slope < 0),
        "moves right": straight & along_x & (x_slope > 0),
        "moves up": straight & along_y & (y_slope < 0),
        "moves down": straight & along_y & (y_slope > 0),
        "bounces sideways": ~straight & along_x & ~still,
        "bounces vertically": ~straight & along_y & ~still,
        "orbits clockwise": ~still & ~along_x & ~along_y & round_ & (turned > TURN),
        "orbits anticlockwise": ~still & ~along_x & ~along_y & round_ & (turned < -TURN),
    }
    holds = jnp.stack([conditions[name] for name in MOTIONS])
    moving = jnp.array([i > 2 for i in range(len(MOTIONS))])
    holds &= ~moving | (jnp.abs(growth) < grows)  # what moves does not grow
    return jnp.where(holds.sum() == 1, jnp.argmax(holds), -1)


def _circle(x: jax.Array, y: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The circle that fits points best (algebraically): centre `[2]` and radius."""
    total = jnp.maximum(weight.sum(), 1e-6)
    x_mean, y_mean = (x * weight).sum() / total, (y * weight).sum() / total
    u, v = x - x_mean, y - y_mean

    def mean(values: jax.Array) -> jax.Array:
        return (values * weight).sum() / total

    uu, vv, uv = mean(u * u), mean(v * v), mean(u * v)
    a, b = mean(u * u * u + u * v * v) / 2, mean(v * v * v + u * u * v) / 2
    determinant = jnp.maximum(uu * vv - uv * uv, 1e-6)
    cx, cy = (a * vv - b * uv) / determinant, (b * uu - a * uv) / determinant
    centre = jnp.stack([x_mean + cx, y_mean + cy])
    return centre, jnp.sqrt(cx * cx + cy * cy + uu + vv)


def _background(video: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kind and colour of what is behind, from the pixels that no thing ever touches in a frame."""
    covered = _grown(masks.max(axis=1))
    free = (covered < 0.05).astype(jnp.float32)
    seen = free.sum(axis=0)
    mean = (video * free[..., None]).sum(axis=0) / jnp.maximum(seen, 1)[..., None]
    weight = (seen > 0).astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1)
    tone = _brightness(mean)
    hue = (mean * weight[..., None]).sum(axis=(0, 1))
    hue = hue / jnp.maximum(hue.max(), 1e-3)
    palette = PALETTE / PALETTE.max(axis=1, keepdims=True)
    colour = jnp.square(hue[None] - palette).sum(axis=-1).argmin()

    average = (tone * weight).sum() / total
    spread = jnp.sqrt((weight * jnp.square(tone - average)).sum() / total)
    patterns = jnp.asarray(_PATTERNS)  # [patterns, WIDTH * WIDTH]
    flat_weight, flat = weight.reshape(-1), ((tone - average) * weight).reshape(-1)
    dot = functools.partial(jnp.matmul, precision="highest")
    pattern_mean = dot(patterns, flat_weight) / total
    pattern_spread = dot(patterns**2, flat_weight) / total - pattern_mean**2
    agreement = dot(patterns, flat) / total
    agreement = agreement / jnp.maximum(spread * jnp.sqrt(pattern_spread), 1e-6)
    best = agreement.argmax()
    kind = jnp.where(agreement[best] > 0.7, jnp.asarray(_KINDS)[best], -1)
    plain = spread < (LIGHT - DARK) * 0.15
    kind = jnp.where(plain, BACKGROUNDS.index("wall"), kind)
    dark = average < DIM
    return jnp.where(dark, kind, -1), jnp.where(dark & (average > DARK / 2), colour, -1)


def _patterns() -> tuple[np.ndarray, np.ndarray]:
    """All patterns that a background can have, flat, and which background each belongs to."""
    pixel = np.arange(WIDTH)
    found: list[tuple[np.ndarray, str]] = []
    for dx in range(2 * CELL):
        for dy in range(CELL):
            squares = ((pixel[None] + dx) // CELL + (pixel[:, None] + dy) // CELL) % 2
            found.append((squares, "checkerboard"))
    for dx in range(2 * STRIPE):
        found.append((np.broadcast_to((pixel[None] + dx) // STRIPE % 2, (WIDTH,) * 2), "curtain"))
    ramp = np.broadcast_to(np.linspace(0, 1, WIDTH)[:, None], (WIDTH,) * 2)
    found += [(ramp, "gradient"), (1 - ramp, "gradient")]
    flat = np.stack([pattern.reshape(-1) for pattern, _ in found]).astype(np.float32)
    return flat, np.array([BACKGROUNDS.index(name) for _, name in found], np.int32)


assert PATTERN % (2 * CELL) == 0 and PATTERN % (2 * STRIPE) == 0
_PATTERNS, _KINDS = _patterns()
