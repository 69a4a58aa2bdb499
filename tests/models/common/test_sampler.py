import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.sampler import (
    SOLVERS,
    Sampler,
    experts,
    guided,
    noise,
    sample,
    sigmas,
    velocity_from_x0,
)

MEAN, SPREAD = 0.7, 0.4  # of Gaussian data, whose velocity is known


def gaussian(x, sigma, step, state):
    """The exact velocity for data N(MEAN, SPREAD^2)."""
    variance = jnp.square((1 - sigma) * SPREAD) + jnp.square(sigma)
    x0 = MEAN + (1 - sigma) * SPREAD**2 / variance * (x - (1 - sigma) * MEAN)
    return (x - x0) / sigma, state


def error(solver, steps):
    x = jnp.linspace(-2.0, 2.0, 9)
    x0, _ = sample(gaussian, x, Sampler(steps=steps, solver=solver))
    return np.abs(x0 - (MEAN + SPREAD * x)).max()


@pytest.mark.parametrize("solver, order", [("euler", 1), ("unipc", 2)])
def test_error_falls_with_the_solver_s_order(solver, order):
    coarse, fine = error(solver, 8), error(solver, 32)
    assert 0.7 * order < np.log(coarse / fine) / np.log(4) and fine < 0.05


def test_unipc_beats_euler():
    assert error("unipc", 12) < error("euler", 12) / 3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps, shift", [(1, 1.0), (2, 3.0), (24, 5.0)])
def test_levels_fall_from_noise_to_data(solver, steps, shift):
    levels = sigmas(Sampler(steps=steps, shift=shift, solver=solver))
    assert len(levels) == steps + 1 and levels[-1] == 0 and levels[0] == pytest.approx(1, abs=1e-5)
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_state_is_threaded_and_the_step_is_traced_once(solver):
    traces = []

    def velocity(x, sigma, step, state):
        traces.append(1)
        return gaussian(x, sigma, step, ())[0], {"count": state["count"] + 1, "last": step}

    start = {"count": jnp.int32(0), "last": jnp.int32(-1)}
    run = jax.jit(lambda x: sample(velocity, x, Sampler(steps=7, solver=solver), start))
    _, state = run(jnp.ones(3))
    assert (int(state["count"]), int(state["last"])) == (7, 6) and len(traces) <= 2


def test_trajectory_holds_what_each_step_saw():
    x = jnp.linspace(-1.0, 1.0, 5)
    sampler = Sampler(steps=6)
    x0, _, seen = sample(gaussian, x, sampler, trajectory=True)
    assert seen.x.shape == seen.v.shape == (6, 5)
    np.testing.assert_array_equal(seen.x[0], x)
    level = sigmas(sampler)[-2]
    np.testing.assert_allclose(seen.x[-1] - level * seen.v[-1], x0, atol=0.05)


def test_progress_is_told_every_step():
    told = []
    run = jax.jit(
        lambda x: sample(gaussian, x, Sampler(steps=5), on_step=lambda n: told.append(int(n)))
    )
    jax.block_until_ready(run(jnp.ones(2)))
    jax.effects_barrier()
    assert sorted(told) == [0, 1, 2, 3, 4]


def test_noise_is_that_of_its_key():
    key = jax.random.key(3)
    np.testing.assert_array_equal(noise(key, (4, 2)), noise(key, (4, 2)))
    assert noise(key, (2,)).dtype == jnp.float32


def test_guidance_is_its_formula_in_one_batch():
    sizes = []

    def model(x, sigma, step, state, condition):
        sizes.append(len(x))
        return x * condition, state

    x, c, u = jnp.ones((2, 1)), jnp.full((2, 1), 5.0), jnp.full((2, 1), 3.0)
    v, _ = guided(model, c, u, 4.0)(x, 0.5, 0, ())
    np.testing.assert_allclose(v, 3 + 4 * (5 - 3))
    v, _ = guided(model, c, u, 1)(x, 0.5, 0, ())
    np.testing.assert_allclose(v, 5)
    assert sizes == [4, 2]


def test_only_the_expert_in_question_runs():
    ran = []

    def expert(name):
        def velocity(x, sigma, step, state):
            jax.debug.callback(lambda: ran.append(name))
            return x, state

        return velocity

    velocity = experts(expert("high"), expert("low"), 0.875)
    sample(velocity, jnp.ones(2), Sampler(steps=4, solver="euler"))
    jax.effects_barrier()
    assert sorted(ran) == ["high", "low", "low", "low"]  # sigmas 1, 0.75, 0.5, 0.25


def test_velocity_of_a_predicted_x0_stops_growing():
    x, x0 = jnp.array([2.0]), jnp.array([1.0])
    np.testing.assert_allclose(velocity_from_x0(x, x0, jnp.float32(0.5), 0.05), 2)
    np.testing.assert_allclose(velocity_from_x0(x, x0, jnp.float32(0.01), 0.05), 20)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps: expected a whole number from 1 up, got 0"),
        ({"steps": 2, "shift": 0.0}, "shift: expected a positive number"),
        ({"steps": 2, "solver": "heun"}, "solver: expected one of euler, unipc, got 'heun'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**options)
