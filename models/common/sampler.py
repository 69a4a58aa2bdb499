"""Flow-matching sampling: x_t = (1 - sigma) x0 + sigma noise, v = noise - x0.

`sample` is one `lax.scan`; `begin` and `advance` do the same a step a call, for whoever wants to
look, stop or save between steps. Everything is pure: the velocity is a function, whatever it
remembers between steps is a pytree that is threaded through, randomness comes from a key.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SOLVERS = ("euler", "unipc")
TIMESTEPS = 1000  # the timestep of sigma = 1
SIGMA_LAST = 1e-3  # UniPC's grid ends here before it jumps to 0, as in the published pipelines
SIGMA_FIRST_GAP = 1e-6  # and begins this far below 1, where log(1 - sigma) is finite

# (x, sigma, step, state) -> (velocity, state); sigma float32 [], step int32 []
Velocity = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How noise becomes a video.

    Attributes:
      steps: evaluations of the velocity.
      shift: s of sigma -> s sigma / (1 + (s - 1) sigma); above 1 spends more steps on noise.
      solver: "euler", or "unipc" (order 2 with corrector, B(h) = e^h - 1).
    """

    steps: int
    shift: float = 1.0
    solver: str = "unipc"

    def __post_init__(self):
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: expected a whole number from 1 up, got {self.steps!r}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift: expected a positive number, got {self.shift}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {self.solver!r}")


class Trajectory(NamedTuple):
    """What each step saw and said: x and v `[steps, *x.shape]`."""

    x: jax.Array
    v: jax.Array


class Step(NamedTuple):
    """Numbers of one step; of all steps, `[steps]` each, from `steps_of`.

    With x0 from the network, x0_old and x0_older from the steps before, the corrected x is
    keep corrected_before + old x0_old + older x0_older + new x0 + x x, and the next x is
    ahead_x corrected + ahead_x0 x0 + ahead_old x0_old.
    """

    number: Any
    sigma: Any
    keep: Any
    old: Any
    older: Any
    new: Any
    x: Any
    ahead_x: Any
    ahead_x0: Any
    ahead_old: Any


class Integration(NamedTuple):
    """Where an integration stands between two steps.

    Attributes:
      x: what the next step begins with; after the last one, the data.
      corrected: x of the step before, as it is known by now.
      x0: what the step before said the data are.
      x0_old: what the one before that said.
      state: what the velocity remembers.
    """

    x: jax.Array
    corrected: jax.Array
    x0: jax.Array
    x0_old: jax.Array
    state: Any


def sigmas(sampler: Sampler) -> np.ndarray:
    """Noise levels `[steps + 1]`, falling to 0: float32 numbers, held in float64.

    Each solver has the grid that its published pipelines use. Before the shift, Euler's is evenly
    spaced from 1 to 0; UniPC's is evenly spaced from 1 to SIGMA_LAST with the last one left out
    (then 0), and starts just below 1. So they differ, most at few steps. (A third one, diffusers'
    default for its Euler scheduler, ends at 1 / 1000 shifted twice; its video pipelines override
    it with the even grid.)
    """
    # The coefficients must see the levels that the network sees: 1 - sigma of the first one has a
    # single digit left in float32.
    return np.append(_levels(sampler), 0.0).astype(np.float32).astype(np.float64)


def timesteps(sampler: Sampler) -> np.ndarray:
    """What the published pipelines tell the network at each step: float32 `[steps]`, 1000 sigma.

    UniPC's are cut to whole numbers, as in those pipelines. A velocity looks its own up by the
    number of the step.
    """
    if sampler.solver == "unipc":
        return np.trunc(TIMESTEPS * _levels(sampler)).astype(np.float32)
    return np.float32(TIMESTEPS) * sigmas(sampler)[:-1].astype(np.float32)


def noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Where sampling starts: standard normal float32."""
    return jax.random.normal(key, shape, jnp.float32)


def sample(
    velocity: Velocity,
    x: jax.Array,
    sampler: Sampler,
    state: Any = (),
    *,
    trajectory: bool = False,
    on_step: Callable[[np.ndarray], None] | None = None,
) -> tuple[jax.Array, Any] | tuple[jax.Array, Any, Trajectory]:
    """Integrate from noise to data; traceable.

    Args:
      velocity: `(x, sigma, step, state) -> (v, state)`.
      x: noise.
      sampler: steps, shift and solver.
      state: pytree that is threaded through the calls of `velocity`.
      trajectory: also return every step's x and v.
      on_step: called on the host with the number of each step, once its x is known
        (`jax.debug.callback`).
    Returns:
      (x0 float32, state), and a Trajectory on request.
    """

    def one(before: Integration, step: Step):
        after, v = advance(velocity, before, step)
        if on_step is not None:
            # An element of the result makes the call wait for it.
            corner = after.x[(0,) * after.x.ndim]
            jax.debug.callback(lambda number, _: on_step(number), step.number, corner)
        return after, Trajectory(before.x, v) if trajectory else None

    last, seen = jax.lax.scan(one, begin(x, state), steps_of(sampler))
    return (last.x, last.state, seen) if trajectory else (last.x, last.state)


def begin(x: jax.Array, state: Any = ()) -> Integration:
    """An integration before its first step, from noise x."""
    x = x.astype(jnp.float32)
    nothing = jnp.zeros_like(x)
    return Integration(x=x, corrected=nothing, x0=nothing, x0_old=nothing, state=state)


def advance(velocity: Velocity, before: Integration, step: Step) -> tuple[Integration, jax.Array]:
    """One step further, and the velocity there; traceable."""
    x = before.x
    v, state = velocity(x, step.sigma, step.number, before.state)
    x0 = x - step.sigma * v
    here = step.keep * before.corrected + step.old * before.x0 + step.older * before.x0_old
    here = here + step.new * x0 + step.x * x
    ahead = step.ahead_x * here + step.ahead_x0 * x0 + step.ahead_old * before.x0
    after = Integration(x=ahead, corrected=here, x0=x0, x0_old=before.x0, state=state)
    return after, v


def guided(
    model: Callable[..., tuple[jax.Array, Any]],
    conditional: Any,
    unconditional: Any,
    scale: float | jax.Array,
) -> Velocity:
    """Classifier-free guidance, both halves in one batch: u + scale (c - u).

    Args:
      model: `(x, sigma, step, state, condition) -> (v, state)`.
      conditional: pytree of arrays `[B, ...]`.
      unconditional: the same shapes, without the prompt.
      scale: the number 1 evaluates the conditional half alone.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, sigma, step, state: model(x, sigma, step, state, conditional)
    both = jax.tree.map(lambda *pair: jnp.concatenate(pair), conditional, unconditional)

    def velocity(x, sigma, step, state):
        v, state = model(jnp.concatenate([x, x]), sigma, step, state, both)
        c, u = jnp.split(v, 2)
        return u + scale * (c - u), state

    return velocity


def experts(high: Velocity, low: Velocity, boundary: float) -> Velocity:
    """Two networks for two ranges of noise: `high` from sigma = boundary up, else `low`.

    Only the one in question is run (`lax.cond`). Both take and return the same state.
    """

    def velocity(x, sigma, step, state):
        return jax.lax.cond(sigma >= boundary, high, low, x, sigma, step, state)

    return velocity


def velocity_from_x0(x: jax.Array, x0: jax.Array, sigma: jax.Array, floor: float) -> jax.Array:
    """The velocity (x - x0) / sigma of a network that predicts x0; sigma at least `floor`."""
    return (x - x0) / jnp.maximum(sigma, floor)


def steps_of(sampler: Sampler) -> Step:
    """The numbers of all steps: float32, computed in float64."""
    levels = sigmas(sampler)
    rows = []
    for n in range(sampler.steps):
        correct, ahead = (0.0, 0.0, 0.0, 0.0, 1.0), _first_order(levels, n)
        if sampler.solver == "unipc":
            if n > 0:
                correct = (*_corrector(levels, n, order=min(2, n)), 0.0)
            # The first and the last step have order 1.
            if 0 < n < sampler.steps - 1:
                ahead = _second_order(levels, n)
        rows.append((levels[n], *correct, *ahead))
    columns = np.array(rows, np.float32).T
    return Step(np.arange(sampler.steps, dtype=np.int32), *columns)


def _levels(sampler: Sampler) -> np.ndarray:
    """The sigma of every step, float64 `[steps]`."""
    last = SIGMA_LAST if sampler.solver == "unipc" else 0.0
    even = np.linspace(1.0, last, sampler.steps + 1)[:-1]
    levels = sampler.shift * even / (1 + (sampler.shift - 1) * even)
    if sampler.solver == "unipc":
        levels[0] -= SIGMA_FIRST_GAP
    return levels


def _log_snr(sigma: float) -> float:
    """Half the logarithm of the signal-to-noise ratio."""
    return np.inf if sigma == 0 else np.log1p(-sigma) - np.log(sigma)


def _first_order(levels: np.ndarray, n: int) -> tuple[float, float, float]:
    """(x, x0, x0_old) coefficients of the exact step for a constant x0; also Euler's step."""
    ratio = levels[n + 1] / levels[n]
    return ratio, 1 - ratio, 0.0


def _second_order(levels: np.ndarray, n: int) -> tuple[float, float, float]:
    """UniPC's predictor of order 2 from step n to n + 1."""
    before, now, then = (_log_snr(level) for level in levels[n - 1 : n + 2])
    x, x0, _ = _first_order(levels, n)
    r = (before - now) / (then - now)
    half = 0.5 * (1 - levels[n + 1]) * np.expm1(now - then) / r
    return x, x0 + half, -half


def _corrector(levels: np.ndarray, n: int, order: int) -> tuple[float, float, float, float]:
    """UniPC's corrector of the step from n - 1 to n: (corrected_before, old, older, new)."""
    now, then = _log_snr(levels[n - 1]), _log_snr(levels[n])
    x, x0, _ = _first_order(levels, n - 1)
    h = now - then
    b_h = np.expm1(h)
    if order == 1:
        r, weights = 1.0, np.array([0.0, 0.5])
    else:
        r = (_log_snr(levels[n - 2]) - now) / (then - now)
        phi2 = b_h / h - 1
        phi3 = phi2 / h - 0.5
        weights = np.linalg.solve(np.array([[1, 1], [r, 1]]), np.array([phi2, 2 * phi3]) / b_h)
    old, new = -(1 - levels[n]) * b_h * weights / np.array([r, 1.0])
    return x, x0 - old - new, old, new
