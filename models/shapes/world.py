"""Scenes: what a clip shows and how it moves. Everything here is jit-able and vmap-able.

A scene is drawn evenly over what captions can say; where things are and how fast they go is free
within bounds that keep every thing inside the frame and every attribute recognisable.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from models.shapes.vocabulary import (
    BACKGROUNDS,
    CAPTION_TOKENS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    VOCABULARY,
    Caption,
    Thing,
)

FRAMES = 16
WIDTH = 64  # and height, in pixels
VIDEO = (FRAMES, WIDTH, WIDTH, 3)
RADII = (6.0, 9.0, 13.0)  # half-extent of a size, in pixels
RADIUS_JITTER = 0.05
GROWTH = 2.0  # last radius over first
REACH = 1.1  # of the widest shape, in radii
TRAVEL = (20.0, 40.0)  # pixels from the first frame to the last
SWING = (18.0, 32.0)  # pixels from one turning point to the other
SWING_PERIOD = (0.6, 0.9)  # in clips: at least two turns
ORBIT = (8.0, 14.0)  # radius in pixels
ORBIT_TURNS = (0.85, 1.0)
PLACEMENTS = 128  # tried for two things
MOST_HIDDEN = 0.5  # of the second thing's width, at worst
HELD_OUT = 8  # one caption in so many is never trained on
PATTERN = 16  # pixels after which every background repeats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scene:
    """One clip; arrays of two things `[2]`, the first in front, the second unused if count is 1.

    Attributes:
      count: int32 `[]`, 1 or 2.
      size, colour, shape, motion: int32 `[2]`, places in the vocabulary's tuples.
      background_colour, background: int32 `[]`.
      pattern: int32 `[2]`, shift of the background's pattern in pixels (x, y).
      radius: float32 `[2]`, geometric middle of the half-extent over the clip.
      place: float32 `[2, 2]`, (x, y) that the motion is centred on.
      extent: float32 `[2]`, travel, swing or orbit radius in pixels.
      pace: float32 `[2]`, period of a swing or turns of an orbit.
      phase: float32 `[2]`, where a swing or an orbit begins, in [0, 1).
    """

    count: jax.Array
    size: jax.Array
    colour: jax.Array
    shape: jax.Array
    motion: jax.Array
    background_colour: jax.Array
    background: jax.Array
    pattern: jax.Array
    radius: jax.Array
    place: jax.Array
    extent: jax.Array
    pace: jax.Array
    phase: jax.Array


@functools.partial(jax.jit, static_argnames=("held_out", "two"))
def sample_scene(key: jax.Array, *, held_out: bool = False, two: float = 0.5) -> Scene:
    """A random scene.

    Args:
      key: of all that is random.
      held_out: from the captions that are never trained on, not from the others.
      two: share of the scenes with two things.
    """
    keys = jax.random.split(key, 8)

    def draw(key: jax.Array, values: tuple[str, ...], shape: tuple[int, ...] = (2,)) -> jax.Array:
        return jax.random.randint(key, shape, 0, len(values))

    colour = draw(keys[0], COLOURS, ())
    other = (colour + 1 + draw(keys[1], COLOURS[1:], ())) % len(COLOURS)
    count = 1 + jax.random.bernoulli(keys[2], two).astype(jnp.int32)
    said = {
        "count": count,
        "size": draw(keys[3], SIZES),
        "colour": jnp.stack([colour, other]),
        "shape": draw(keys[4], SHAPES),
        "motion": draw(keys[5], MOTIONS),
    }
    background_colour, background = draw(keys[6], COLOURS, (2,)), draw(keys[6], BACKGROUNDS, ())
    rest = _code(said) + background_colour[0] + background
    if held_out:
        background_colour = (background_colour - rest) % HELD_OUT
    else:
        background = jnp.where(
            rest % HELD_OUT == 0, (background + 1) % len(BACKGROUNDS), background
        )
    said |= {"background_colour": background_colour[0], "background": background}
    return _placed(keys[7], said)


def scene_of(caption: Caption, key: jax.Array) -> Scene:
    """A random scene that the caption describes."""
    things = (*caption.things, caption.things[0])[:2]

    def indices(field: str, values: tuple[str, ...]) -> jax.Array:
        return jnp.array([values.index(getattr(thing, field)) for thing in things], jnp.int32)

    said = {
        "count": jnp.int32(len(caption.things)),
        "size": indices("size", SIZES),
        "colour": indices("colour", COLOURS),
        "shape": indices("shape", SHAPES),
        "motion": indices("motion", MOTIONS),
        "background_colour": jnp.int32(COLOURS.index(caption.background_colour)),
        "background": jnp.int32(BACKGROUNDS.index(caption.background)),
    }
    return _placed(key, said)


def caption_of(scene: Scene) -> Caption:
    """What a (single, concrete) scene shows, in words."""
    things = tuple(
        Thing(
            SIZES[scene.size[i]],
            COLOURS[scene.colour[i]],
            SHAPES[scene.shape[i]],
            MOTIONS[scene.motion[i]],
        )
        for i in range(int(scene.count))
    )
    return Caption(things, COLOURS[scene.background_colour], BACKGROUNDS[scene.background])


@jax.jit
def is_held_out(scene: Scene) -> jax.Array:
    """Whether training never sees this scene's caption, bool `[]`."""
    said = {name: getattr(scene, name) for name in ("count", "size", "colour", "shape", "motion")}
    return (_code(said) + scene.background_colour + scene.background) % HELD_OUT == 0


@jax.jit
def caption_tokens(scene: Scene) -> jax.Array:
    """What `tokenize` makes of the scene's caption, int32 `[CAPTION_TOKENS]`."""

    def words(values: tuple[str, ...], index: jax.Array) -> jax.Array:
        table = [[VOCABULARY.index(word) for word in value.split()] for value in values]
        return jnp.array(table, jnp.int32)[index]

    def thing(i: int) -> list[jax.Array]:
        return [
            words(("a",), jnp.int32(0)),
            words(SIZES, scene.size[i]),
            words(COLOURS, scene.colour[i]),
            words(SHAPES, scene.shape[i]),
            words(MOTIONS, scene.motion[i]),
        ]

    place = [
        words(("over a",), jnp.int32(0)),
        words(COLOURS, scene.background_colour),
        words(BACKGROUNDS, scene.background),
    ]
    both = jnp.concatenate([*thing(0), words(("and",), jnp.int32(0)), *thing(1), *place])
    alone = jnp.concatenate([*thing(0), *place])
    both, alone = (jnp.pad(ids, (0, CAPTION_TOKENS - len(ids))) for ids in (both, alone))
    return jnp.where(scene.count == 2, both, alone)


@jax.jit
def tracks(scene: Scene) -> tuple[jax.Array, jax.Array]:
    """Where things are: centres float32 `[FRAMES, 2, 2]` (thing, (x, y)), radii `[FRAMES, 2]`."""
    time = jnp.linspace(0.0, 1.0, FRAMES)[:, None]
    motion, extent, phase = scene.motion[None], scene.extent[None], scene.phase[None]
    slide = extent * (time - 0.5)
    swing = extent * (2 * jnp.abs((phase + time / scene.pace[None]) % 1 - 0.5) - 0.5)
    angle = 2 * jnp.pi * (phase + scene.pace[None] * time * _pick(motion, ORBITS))
    orbit = [extent * jnp.cos(angle), extent * jnp.sin(angle)]
    along = [
        _pick(motion, slides) * slide
        + _pick(motion, swings) * swing
        + _pick(motion, jnp.abs(ORBITS)) * turn
        for slides, swings, turn in ((SLIDES_X, SWINGS_X, orbit[0]), (SLIDES_Y, SWINGS_Y, orbit[1]))
    ]
    centres = scene.place[None] + jnp.stack(along, axis=-1)
    return centres, scene.radius[None] * GROWTH ** (_pick(motion, GROWS) * (time - 0.5))


def speed(scene: Scene) -> jax.Array:
    """Of the fastest thing, in pixels a frame, float32 `[]`; growing in place is no speed."""
    centres, _ = tracks(scene)
    paces = jnp.linalg.norm(jnp.diff(centres, axis=0), axis=-1).mean(axis=0)  # [2]
    return jnp.where(jnp.arange(2) < scene.count, paces, 0).max()


def _per_motion(**values: float) -> np.ndarray:
    """A number for each motion by its name with "_" for " ", 0 for the others."""
    return np.array([values.get(name.replace(" ", "_"), 0.0) for name in MOTIONS], np.float32)


# y points down, so that growing angles turn clockwise.
GROWS = _per_motion(grows_steadily=1, shrinks_steadily=-1)
SLIDES_X = _per_motion(moves_right=1, moves_left=-1)
SLIDES_Y = _per_motion(moves_down=1, moves_up=-1)
SWINGS_X = _per_motion(bounces_sideways=1)
SWINGS_Y = _per_motion(bounces_vertically=1)
ORBITS = _per_motion(orbits_clockwise=1, orbits_anticlockwise=-1)


def _pick(index: jax.Array, values: np.ndarray | jax.Array) -> jax.Array:
    return jnp.asarray(values)[index]


def _code(said: dict[str, jax.Array]) -> jax.Array:
    """A sum over what is said of the things; captions with sum 0 modulo HELD_OUT are held out."""
    code = said["size"] + said["colour"] + said["shape"] + said["motion"]
    return code[0] + jnp.where(said["count"] == 2, code[1], 0)


@jax.jit
def _placed(key: jax.Array, said: dict[str, jax.Array]) -> Scene:
    """A scene that shows what is said, two things so that both can be seen."""
    keys = jax.random.split(key, 3)
    pattern = jax.random.randint(keys[0], (2,), 0, PATTERN)
    first, second = (
        jax.vmap(_movement, (0, None, None))(
            jax.random.split(keys[1 + i], PLACEMENTS), said["size"][i], said["motion"][i]
        )
        for i in range(2)
    )

    def joined(first: dict[str, jax.Array], second: dict[str, jax.Array]) -> Scene:
        pairs = {name: jnp.stack([first[name], second[name]]) for name in first}
        return Scene(**said, **pairs, pattern=pattern)

    hidden = jax.vmap(lambda *movements: _hidden(joined(*movements)))(first, second)
    # The first placement that hides little, else the one that hides least.
    best = jnp.argmin(jnp.maximum(hidden, MOST_HIDDEN))
    return joined(*jax.tree.map(lambda values: values[best], (first, second)))


def _hidden(scene: Scene) -> jax.Array:
    """Part of the second thing's width that the first covers, at worst over the clip."""
    centres, radii = tracks(scene)
    distance = jnp.linalg.norm(centres[:, 0] - centres[:, 1], axis=-1)
    return jnp.max((radii[:, 0] + radii[:, 1] - distance) / (2 * radii[:, 1]))


def _movement(key: jax.Array, size: jax.Array, motion: jax.Array) -> dict[str, jax.Array]:
    """Radius, place, extent, pace and phase of one thing that stays inside the frame."""
    keys = jax.random.split(key, 5)

    def between(key: jax.Array, low: jax.Array | float, high: jax.Array | float) -> jax.Array:
        return low + (high - low) * jax.random.uniform(key)

    jitter = between(keys[0], 1 - RADIUS_JITTER, 1 + RADIUS_JITTER)
    radius = jnp.array(RADII)[size] * jitter
    grows = jnp.abs(_pick(motion, GROWS))
    margin = 1 + REACH * radius * GROWTH ** (grows / 2)
    room = WIDTH - 2 * margin
    slides = jnp.abs(jnp.stack([_pick(motion, SLIDES_X), _pick(motion, SLIDES_Y)]))
    swings = jnp.stack([_pick(motion, SWINGS_X), _pick(motion, SWINGS_Y)])
    orbits = jnp.abs(_pick(motion, ORBITS))
    extent = (
        slides.sum() * between(keys[1], TRAVEL[0], jnp.minimum(TRAVEL[1], room))
        + swings.sum() * between(keys[1], SWING[0], jnp.minimum(SWING[1], room))
        + orbits * between(keys[1], ORBIT[0], jnp.minimum(ORBIT[1], room / 2))
    )
    pace = jnp.where(orbits > 0, between(keys[2], *ORBIT_TURNS), between(keys[2], *SWING_PERIOD))
    side = extent * ((slides + swings) / 2 + orbits)  # how far it goes from its place, (x, y)
    free = room - 2 * side
    place = margin + side + free * jax.random.uniform(keys[3], (2,))
    return {
        "radius": radius,
        "place": place,
        "extent": extent,
        "pace": pace,
        "phase": jax.random.uniform(keys[4]),
    }
