"""Our solvers equal diffusers' schedulers, run now. Needs the parity extra."""

import numpy as np
import pytest

from models.common.sampler import timesteps
from scripts.make_goldens import SAMPLERS, diffusers_scheduler, diffusers_trajectory, sampler_key
from tests.models.common.test_sampler_parity import golden, our_trajectory, tolerance

pytestmark = pytest.mark.parity
pytest.importorskip("torch", reason="needs the parity extra")
pytest.importorskip("diffusers", reason="needs the parity extra")


@pytest.mark.parametrize("sampler", SAMPLERS, ids=sampler_key)
def test_equals_diffusers(sampler):
    expected = diffusers_trajectory(sampler)
    atol = tolerance(sampler, expected)
    np.testing.assert_allclose(our_trajectory(sampler), expected, rtol=0, atol=atol)
    np.testing.assert_allclose(golden(sampler), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=sampler_key)
def test_the_network_is_told_diffusers_timesteps(sampler):
    expected = diffusers_scheduler(sampler).timesteps.numpy()
    np.testing.assert_allclose(timesteps(sampler), expected, rtol=1e-6)
