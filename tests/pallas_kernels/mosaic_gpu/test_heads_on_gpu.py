"""Queries and keys in one pass on a GPU: JAX_PLATFORMS=cuda python -m pytest <this file>."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Projected, device, prepare_heads
from pallas_kernels.mosaic_gpu import heads
from pallas_kernels.mosaic_gpu.attention_operands import in_order
from sdq.rotate import hadamard
from tests.pallas_kernels.mosaic_gpu.test_heads import Case, off

pytestmark = pytest.mark.skipif(not device.current().is_hopper, reason="needs a Hopper GPU")

SMS = device.current().cores
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


def projected(case):
    """What `heads` takes."""
    task, given = case.task, {name: jnp.asarray(x) for name, x in case.inputs.items()}
    return Projected(
        x=given["x"],
        gain=None if task.eps is None else given["gain"],
        rope=(given["cos"], given["sin"]) if task.rope else None,
        heads=task.heads,
        eps=task.eps or 0.0,
    )


def filled_up(y, multiple):
    """By the first token."""
    more = -y.shape[1] % multiple
    return np.concatenate([y, np.broadcast_to(y[:, :1], (len(y), more, *y.shape[2:]))], axis=1)


def test_bf16(case):
    if case.task.rotate:
        case.task = dataclasses.replace(case.task, rotate=False)
    expected, x = case.expected(), projected(case)
    found = np.asarray(prepare_heads(x, implementation="mosaic_gpu"), np.float64)
    # A neighbour among bf16 numbers at most; what cancels in a rotation is as exact as its terms.
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-5 * abs(expected).max())
    again = np.asarray(prepare_heads(x, implementation="reference"), np.float64)
    assert off(found, again) < 3 * 2**-8  # the kernel rounds once, plain JAX twice


def test_queries(case):
    y = filled_up(case.expected(), 8).swapaxes(1, 2)
    q = heads.queries(projected(case), rotate=case.task.rotate, num_sms=SMS)
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
    y, subtract = case.expected(), None
    if center:
        subtract = case.inputs["center"].reshape(len(y), *y.shape[2:])
        turned = hadamard(jnp.asarray(subtract), y.shape[-1]) if case.task.rotate else subtract
        y = y - np.asarray(turned, np.float64)[:, None]
        subtract = jnp.asarray(subtract)
    y = filled_up(y, 128).swapaxes(1, 2)
    k = heads.keys(projected(case), rotate=case.task.rotate, center=subtract, num_sms=SMS)
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
    x = projected(case)
    q = heads.queries(x, rotate=True, num_sms=SMS)
    k = heads.keys(x, rotate=True, center=None, num_sms=SMS)
    bad = np.zeros((2, 3, 304), bool)
    bad[1, 1, 17] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(q.values, np.float32)).all(-1), bad)
    np.testing.assert_array_equal(np.isnan(np.asarray(q.values, np.float32)).any(-1), bad)
    bad = np.zeros((2, 3, 384), bool)
    bad[1, 1] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(k.values, np.float32)).all(-1), bad)


@pytest.mark.parametrize("videos, tokens, count, width", [(1, 32760, 40, 128), (2, 999, 3, 64)])
def test_values(rng, videos, tokens, count, width):
    x = jnp.asarray(rng.randn(videos, tokens, count * width), jnp.bfloat16).at[0, 5, 9].set(np.nan)
    v = heads.values(Projected(x=x, heads=count), num_sms=SMS)
    largest = np.abs(np.asarray(x, np.float32)).max(axis=1)
    good = np.isfinite(largest)
    scales = np.asarray(v.scales).reshape(videos, -1)
    np.testing.assert_array_equal(scales[good], np.exp2(np.floor(np.log2(largest[good])) - 7))
    y = (x.astype(jnp.float32) / jnp.where(good, scales, np.nan)[:, None]).astype(v.values.dtype)
    y = jnp.moveaxis(y.reshape(videos, tokens, count, width), 1, 3)
    y = jnp.pad(y, ((0, 0), (0, 0), (0, 8), (0, -tokens % 128)))
    y = y.at[:, :, width:, :tokens].set(1).at[0, 0, 9].set(np.nan)
    bits = (np.asarray(each).view(np.uint8) for each in (v.values, in_order(y)))
    np.testing.assert_array_equal(*bits)
