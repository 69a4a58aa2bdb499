import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from models.common.layers import Ops
from models.common.quantizer import InputQuantizer, SiteRule
from models.shapes import scan
from models.shapes.compare import Model, step_sqnr_db
from models.shapes.config import CONFIG
from models.shapes.generate import SAMPLER, Settings, generate
from models.shapes.params import load
from models.wan.sites import VIDEO_SITES

QUICK = Settings(sampler=dataclasses.replace(SAMPLER, steps=3), guidance=1.0, dtype=jnp.float32)


@pytest.fixture(scope="module")
def params():
    return load()


@pytest.fixture(scope="module")
def seen(params):
    return scan.watch(params, QUICK, captions=2)


def test_it_watches_every_step_of_the_model_s_own_samples(params, seen):
    assert seen.x.shape[:2] == (3, 2) and len(seen.levels) == 3
    assert float(jnp.std(seen.x[0])) == pytest.approx(1, abs=0.01)  # begins as noise
    again, _ = generate(params, seen.tokens, seen.x[0] + 0, settings=QUICK, trajectory=True)
    assert np.isfinite(again).all()


def test_moments_of_every_site_are_symmetric_and_positive(params, seen):
    found = scan.statistics(params, seen, jnp.float32)
    assert found["blocks/ffn/down"].second_moment.shape == (CONFIG.dit.layers, 1024, 1024)
    for moment, largest in found.values():
        squares = jnp.diagonal(moment, axis1=1, axis2=2)
        assert (squares <= largest**2 * 1.001).all()
        np.testing.assert_allclose(moment, np.swapaxes(moment, 1, 2), rtol=1e-3, atol=1e-4)
        assert (np.linalg.eigvalsh(np.asarray(moment, np.float64)) > -1e-3 * moment.max()).all()


def test_thinned_keeps_first_and_last(seen):
    thin = seen.thinned(2)
    np.testing.assert_array_equal(thin.levels, seen.levels[jnp.array([0, 2])])
    assert len(seen.thinned(9).x) == 3


@pytest.mark.slow
def test_noise_adds_up_to_what_quantising_everything_does(params, seen):
    """To first order, and within the scatter of a few probes."""
    rules = (SiteRule("blocks/.*", "sdq32:16"),)
    noise = scan.noise(params, seen, rules, probes=8, dtype=jnp.float32)
    assert {power.shape for power in noise.values()} == {(3, CONFIG.dit.layers, 5)}
    predicted = -10 * np.log10(sum(power.sum(axis=(1, 2)) for power in noise.values()))
    video_sites = tuple(SiteRule(site, "sdq32:16") for site in VIDEO_SITES)
    model = Model(
        params, dataclasses.replace(QUICK, ops=Ops(quantizer=InputQuantizer(video_sites)))
    )
    _, reference = generate(params, seen.tokens, seen.x[0] + 0, settings=QUICK, trajectory=True)
    measured = step_sqnr_db(model, seen.tokens, reference).mean(axis=1)
    np.testing.assert_allclose(predicted, measured, atol=2.0)
