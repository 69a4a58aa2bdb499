import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.shapes.detect import detect, verdicts
from models.shapes.render import render
from models.shapes.vocabulary import EXAMPLE, SLOTS, parse
from models.shapes.world import VIDEO, sample_scene, scene_of

SCENE = scene_of(parse(EXAMPLE), jax.random.key(0))
VIDEO_OF_SCENE = render(SCENE).video


@jax.jit
def judge(scene, video):
    return verdicts(scene, detect(video))


def right_share(count, *, seed, sigma=0.0, blur=False):
    """Shares of right verdicts on ground truth, one clip at a time."""

    def one(key):
        scene = sample_scene(key)
        video = render(scene).video
        if blur:
            window, ones = (1, 3, 3, 1), (1, 1, 1, 1)
            total = jax.lax.reduce_window(video, 0.0, jax.lax.add, window, ones, "SAME")
            video = total / 9
        video = video + sigma * jax.random.normal(key, video.shape)
        return verdicts(scene, detect(video))

    keys = jax.random.split(jax.random.key(seed), count)
    found = jax.jit(lambda keys: jax.lax.map(one, keys))(keys)
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_ground_truth_is_recognised_also_with_noise():
    shares = right_share(20, seed=11, sigma=0.03)
    assert shares["all"] == 1, shares


@pytest.mark.slow
@pytest.mark.parametrize("sigma, clips", [(0.0, 2000), (0.03, 500)])
def test_all_of_many_clips_are_recognised(sigma, clips):
    shares = right_share(clips, seed=13, sigma=sigma)
    assert shares["all"] == 1, shares


@pytest.mark.slow
def test_blurred_and_noisy_clips_are_mostly_recognised():
    shares = right_share(200, seed=14, sigma=0.03, blur=True)
    assert shares["all"] >= 0.9, shares


@pytest.mark.parametrize(
    "old, new, wrong",
    [
        ("large", "medium", "size"),
        ("red", "orange", "colour"),
        ("circle", "square", "shape"),
        ("moves left", "moves up", "motion"),
        ("checkerboard", "wall", "background"),
        ("blue", "cyan", "background"),
    ],
)
def test_another_attribute_is_wrong_and_nothing_else(old, new, wrong):
    assert old in EXAMPLE and (new in sum(SLOTS.values(), ()))
    other = scene_of(parse(EXAMPLE.replace(old, new)), jax.random.key(0))
    found = judge(other, VIDEO_OF_SCENE)
    # Without the colour the thing itself is not found.
    lost = {"colour", "shape", "size", "motion", "all"} if wrong == "colour" else {wrong, "all"}
    assert {name for name, value in found.items() if not value} == lost


def test_a_second_thing_is_missed():
    text = EXAMPLE.replace(" over", " and a small green ring moves up over")
    found = judge(scene_of(parse(text), jax.random.key(0)), VIDEO_OF_SCENE)
    assert not found["count"] and not found["all"]


def test_a_thing_that_vanishes_is_no_motion():
    empty = jnp.broadcast_to(VIDEO_OF_SCENE[:1, :1, :1] * 0 + 0.1, VIDEO)
    for gone in (slice(8, None), slice(1, None, 2)):
        found = judge(SCENE, VIDEO_OF_SCENE.at[gone].set(empty[gone]))
        assert not found["motion"] and not found["all"]


@pytest.mark.parametrize(
    "video",
    [
        jnp.zeros(VIDEO),
        jnp.ones(VIDEO),
        jax.random.uniform(jax.random.key(0), VIDEO),
        VIDEO_OF_SCENE.at[3, 5, 5].set(jnp.nan),
    ],
    ids=["black", "white", "noise", "not a number"],
)
def test_a_broken_clip_shows_nothing(video):
    found = judge(SCENE, video)
    assert not found["all"] and not found["motion"]
