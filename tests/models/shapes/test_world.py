import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.shapes.vocabulary import EXAMPLE, MOTIONS, parse, tokenize
from models.shapes.world import (
    FRAMES,
    REACH,
    TRAVEL,
    WIDTH,
    caption_of,
    caption_tokens,
    is_held_out,
    sample_scene,
    scene_of,
    tracks,
)

MANY = 4000


@functools.cache  # compiling takes longer than drawing
def draw(held_out):
    return jax.jit(jax.vmap(functools.partial(sample_scene, held_out=held_out)))


@functools.cache
def scenes(count=MANY, *, held_out=False):
    every = draw(held_out)(jax.random.split(jax.random.key(0), MANY))
    return jax.tree.map(lambda leaf: leaf[:count], every)


def one(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def test_things_stay_inside_the_frame():
    many = scenes()
    centres, radii = jax.vmap(tracks)(many)
    reach = REACH * np.asarray(radii)[..., None]
    assert (centres - reach).min() > 0 and (centres + reach).max() < WIDTH


def test_tokens_on_the_device_equal_tokens_of_the_text():
    many = scenes(50)
    tokens = jax.vmap(caption_tokens)(many)
    for i in range(50):
        np.testing.assert_array_equal(tokens[i], tokenize(str(caption_of(one(many, i)))))


def test_scene_of_a_caption_shows_that_caption():
    many = scenes(10)
    for i in range(10):
        caption = caption_of(one(many, i))
        assert caption_of(scene_of(caption, jax.random.key(7))) == caption


def test_training_and_held_out_captions_are_disjoint():
    assert not jax.vmap(is_held_out)(scenes()).any()
    assert jax.vmap(is_held_out)(scenes(held_out=True)).all()


@pytest.mark.parametrize("held_out", [False, True])
def test_every_attribute_occurs_about_evenly(held_out):
    many = scenes(held_out=held_out)
    for name, kinds in (("size", 3), ("colour", 8), ("shape", 5), ("motion", 11)):
        share = np.bincount(np.ravel(getattr(many, name)), minlength=kinds) / (2 * MANY)
        np.testing.assert_allclose(share, 1 / kinds, atol=0.025)
    for name, kinds in (("background", 4), ("background_colour", 8)):
        share = np.bincount(np.ravel(getattr(many, name)), minlength=kinds) / MANY
        np.testing.assert_allclose(share, 1 / kinds, atol=0.04)
    assert 0.45 < np.mean(many.count == 2) < 0.55


def test_same_key_same_scene():
    again = draw(False)(jax.random.split(jax.random.key(0), MANY))
    other = draw(False)(jax.random.split(jax.random.key(1), MANY))
    for a, b in zip(jax.tree.leaves(scenes()), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(scenes().place, other.place)


def test_more_scenes_with_two_things_on_request():
    drawn = jax.jit(jax.vmap(functools.partial(sample_scene, two=0.75)))
    counts = drawn(jax.random.split(jax.random.key(0), MANY)).count
    assert np.mean(counts == 2) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_do_what_they_say(motion):
    caption = parse(EXAMPLE.replace("moves left", motion))
    centres, radii = tracks(scene_of(caption, jax.random.key(3)))
    x, y, radius = (
        np.asarray(centres[:, 0, 0]),
        np.asarray(centres[:, 0, 1]),
        np.asarray(radii[:, 0]),
    )
    way = {"left": -x, "right": x, "up": -y, "down": y}
    verb, how = motion.split()
    if verb == "moves":
        assert way[how][-1] - way[how][0] >= TRAVEL[0] - 1e-3
        assert (np.diff(way[how]) > 0).all()
    elif verb == "bounces":
        along, across = (x, y) if how == "sideways" else (y, x)
        turns = np.sum(np.diff(np.sign(np.diff(along))) != 0)
        assert turns >= 1 and np.ptp(across) < 1e-4
    elif verb == "orbits":
        angle = np.unwrap(np.arctan2(y - y.mean(), x - x.mean()))
        assert (angle[-1] - angle[0]) * {"clockwise": 1, "anticlockwise": -1}[how] > np.pi
    else:
        assert np.ptp(x) < 1e-4 and np.ptp(y) < 1e-4
        ratio = {"grows": 2.0, "shrinks": 0.5, "stays": 1.0}[verb]
        np.testing.assert_allclose(radius[-1] / radius[0], ratio, rtol=1e-5)
    assert len(x) == FRAMES


def test_occlusion_happens_and_is_bounded():
    many = scenes()
    centres, radii = jax.vmap(tracks)(many)
    apart = jnp.linalg.norm(centres[:, :, 0] - centres[:, :, 1], axis=-1)
    hidden = (radii[..., 0] + radii[..., 1] - apart) / (2 * radii[..., 1])
    worst = np.asarray(hidden.max(axis=1))[np.asarray(many.count) == 2]
    assert np.mean(worst > 0.1) > 0.3 and np.mean(worst > 0.5) < 0.02 and worst.max() < 0.7
