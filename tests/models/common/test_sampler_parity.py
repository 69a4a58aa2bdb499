"""Our solvers follow diffusers' trajectories (committed goldens)."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.common.sampler import sample
from scripts.make_goldens import GOLDENS, NOISE, SAMPLERS, field, sampler_key


def tolerance(sampler, expected):
    """Each step may round the last float32 digit of the largest value another way."""
    return (sampler.steps + 1) * np.spacing(np.abs(expected).max())


def golden(sampler):
    with np.load(GOLDENS / "sampler.npz") as file:
        return file[sampler_key(sampler)]


def our_trajectory(sampler):
    """The x of every step and the last one."""

    def velocity(x, sigma, step, state):
        return field(x, sigma, jnp), state

    x0, _, seen = sample(velocity, jnp.asarray(NOISE), sampler, trajectory=True)
    return np.concatenate([seen.x, x0[None]])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=sampler_key)
def test_equals_the_golden(sampler):
    expected = golden(sampler)
    atol = tolerance(sampler, expected)
    np.testing.assert_allclose(our_trajectory(sampler), expected, rtol=0, atol=atol)
