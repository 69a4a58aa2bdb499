import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.shapes.detect import BRIGHT, DIM
from models.shapes.render import PALETTE, coverage, flow, render, static_pixels
from models.shapes.vocabulary import SHAPES
from models.shapes.world import VIDEO, sample_scene
from sdq import video_metrics


@pytest.fixture(scope="module")
def many():
    keys = jax.random.split(jax.random.key(1), 24)
    found = jax.jit(jax.vmap(sample_scene))(keys)
    return found, jax.jit(jax.vmap(render))(found)


def test_clips_are_pixels(many):
    _, clips = many
    assert clips.video.shape == (24, *VIDEO) and clips.video.dtype == jnp.float32
    assert np.isfinite(clips.video).all()
    assert clips.video.min() >= 0 and clips.video.max() <= 1 + 1e-6


def test_masks_share_the_pixels(many):
    found, clips = many
    assert clips.masks.min() >= 0 and clips.masks.sum(axis=2).max() <= 1 + 1e-6
    assert not clips.masks[np.asarray(found.count) == 1, :, 1].any()


def test_brightness_tells_things_from_background(many):
    _, clips = many
    bright = np.asarray(clips.video.max(axis=-1))
    covered = np.asarray(clips.masks.sum(axis=2))
    assert (
        bright[np.asarray(clips.masks.max(axis=2)) > 0.999].min() > BRIGHT
        and bright[covered < 1e-6].max() < DIM
    )
    assert PALETTE.max(axis=1).min() >= 0.9


def test_an_unhidden_thing_is_centred_on_its_track(many):
    _, clips = many
    pixel = np.arange(64) + 0.5
    masks = np.asarray(clips.masks[:, :, 0], np.float64)
    area = masks.sum(axis=(2, 3))
    x = (masks * pixel).sum(axis=(2, 3)) / area
    y = (masks * pixel[:, None]).sum(axis=(2, 3)) / area
    np.testing.assert_allclose(np.stack([x, y], -1), clips.centres[:, :, 0], atol=0.12)


@pytest.mark.parametrize("kind, area", [(0, 3.142), (1, 2.89), (2, 1.572), (3, 2.258), (4, 2.171)])
def test_areas_are_those_of_the_shapes(kind, area):
    drawn = coverage(jnp.array([31.3, 32.8]), jnp.float32(15.0), jnp.int32(kind)).sum()
    np.testing.assert_allclose(drawn / 15**2, area, rtol=0.02, err_msg=SHAPES[kind])


def test_flow_warps_the_next_frame_back(many):
    _, clips = many
    for i in range(8):
        clip = jax.tree.map(lambda leaf, i=i: leaf[i], clips)
        thing = (clip.masks[:-1, 0] > 0.99) & (clip.masks[1:, 0].max() > 0)
        inner = jax.lax.reduce_window(
            clip.masks[:-1, 0], jnp.inf, jax.lax.min, (1, 5, 5), (1, 1, 1), "SAME"
        )
        moves = flow(clip.centres, clip.radii, clip.masks)
        valid = thing & (inner > 0.99)
        if valid.any():
            assert video_metrics.warping_error(clip.video, moves, valid) < 1e-3
        resting = video_metrics.warping_error(clip.video, jnp.zeros_like(moves), valid)
        assert np.isfinite(resting) or not valid.any()


def test_static_pixels_never_change(many):
    _, clips = many
    for i in range(8):
        static = static_pixels(clips.masks[i])
        assert 0.1 < static.mean() < 1
        assert video_metrics.flicker(clips.video[i], static) < 1e-6
