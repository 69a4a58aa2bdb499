"""Queries and keys in one pass on a GPU: JAX_PLATFORMS=cuda python -m pytest <this file>."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.mosaic_gpu import heads
from tests.pallas_kernels.mosaic_gpu.test_heads import Case, off

pytestmark = pytest.mark.skipif(not device.current().is_hopper, reason="needs a Hopper GPU")

ALL = {"eps": 1e-6, "rope": True, "rotate": True}


@pytest.fixture(
    params=[
        {"videos": 1, "tokens": 32760, "count": 2, "width": 128, **ALL},
        {"videos": 2, "tokens": 1001, "count": 40, "width": 128, **ALL},
        {"videos": 1, "tokens": 333, "count": 12, "width": 128, **ALL},
        {"videos": 3, "tokens": 77, "count": 33, "width": 64, "eps": None, "rope": True},
        {"videos": 1, "tokens": 3, "count": 24, "width": 128, **ALL | {"rotate": False}},
    ],
    ids=str,
)
def case(request, rng):
    return Case(rng, **({"rotate": False, "center": False} | request.param))


def steps(case):
    """Arguments of `heads.queries` that do what the case wants."""
    task, given = case.task, {name: jnp.asarray(x) for name, x in case.inputs.items()}
    return {
        "x": given["x"],
        "heads": task.heads,
        "norm": None if task.eps is None else heads.Norm(given["gain"], task.eps),
        "rope": heads.Rope(given["cos"], given["sin"]) if task.rope else None,
        "rotate": task.rotate,
        "num_sms": device.current().cores,
    }


def test_queries(case):
    y = case.expected().swapaxes(1, 2)
    q = heads.queries(**steps(case))
    norms = np.linalg.norm(y, axis=-1, keepdims=True)
    exponents = np.log2(np.asarray(q.scales))
    # An approximate reciprocal root may put a norm on the other side of a power of two.
    at_edge = abs(np.log2(norms) - np.round(np.log2(norms))) < 1e-5
    assert ((exponents == np.floor(np.log2(norms)) - 4) | at_edge).all()
    assert off(np.asarray(q.values, np.float64) * np.asarray(q.scales), y) < 2**-4
    again = (y / np.asarray(q.scales)).astype(np.float32).astype(q.values.dtype)
    assert (np.asarray(q.values) == again).mean() > 0.999


@pytest.mark.parametrize("center", [False, True])
def test_keys(case, center):
    more = {"center": jnp.asarray(case.inputs["center"])} if center else {}
    y = case.expected()
    if center:
        y = y - case.inputs["center"].astype(np.float64).reshape(len(y), 1, *y.shape[2:])
    y = y.swapaxes(1, 2)
    k = heads.keys(**steps(case), **more)
    largest = np.linalg.norm(y, axis=-1).max(axis=-1)
    np.testing.assert_array_equal(
        np.asarray(k.scales)[..., 0, 0], np.exp2(np.floor(np.log2(largest)) - 4)
    )
    again = (y / np.asarray(k.scales)).astype(np.float32).astype(k.values.dtype)
    assert (np.asarray(k.values) == again).mean() > 0.999


def test_one_bad_number(rng):
    """Spoils its query, and all keys of its head."""
    case = Case(rng, 2, 300, 3, 128, eps=None, rope=True, rotate=True, center=False)
    case.inputs["x"][1, 17, 200] = np.nan
    q, k = (make(**steps(case)) for make in (heads.queries, heads.keys))
    bad = np.zeros((2, 3, 300), bool)
    bad[1, 1, 17] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(q.values, np.float32)).all(-1), bad)
    np.testing.assert_array_equal(np.isnan(np.asarray(q.values, np.float32)).any(-1), bad)
    bad[1, 1] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(k.values, np.float32)).all(-1), bad)
