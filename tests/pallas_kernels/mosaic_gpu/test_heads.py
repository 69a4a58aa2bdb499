"""Queries, keys and values: the programs run on a CPU, and compiled for an H100."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import Projected
from pallas_kernels.mosaic_gpu import heads, values_program
from pallas_kernels.mosaic_gpu.attention_operands import NORM_TOP, in_order
from pallas_kernels.mosaic_gpu.heads_program import KEYS, NORMS, PREPARED, QUERIES, Task, program
from sdq.rotate import hadamard
from tests.pallas_kernels import deviceless
from tests.pallas_kernels.mosaic_gpu import ptx_machine

E4M3 = ml_dtypes.float8_e4m3fn
BLOCKS, WARPS = 2, 4


class Case:
    """Inputs of a task, and what they should become, `[B, S, H, D]` in float64."""

    def __init__(self, rng, videos, tokens, count, width, filled=None, **steps):
        channels = count * width
        self.task = Task(
            what=QUERIES,
            videos=videos,
            tokens=tokens,
            filled=filled or tokens,
            heads=count,
            width=width,
            top=NORM_TOP,
            warps=WARPS,
            **steps,
        )
        angles = rng.rand(tokens, width // 2) * 6
        self.inputs = {
            "x": (3 * rng.randn(videos, tokens, channels)).astype(ml_dtypes.bfloat16),
            "gain": (0.5 + rng.rand(channels)).astype(np.float32),
            "cos": np.cos(angles).astype(np.float32),
            "sin": np.sin(angles).astype(np.float32),
            "center": rng.randn(videos, channels).astype(np.float32),
        }

    def expected(self):
        task, arrays = self.task, {k: v.astype(np.float64) for k, v in self.inputs.items()}
        y = arrays["x"]
        if task.eps is not None:
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + task.eps) * arrays["gain"]
        y = y.reshape(task.videos, task.tokens, task.heads, task.width)
        if task.rope:
            a, b = y[..., ::2], y[..., 1::2]
            cos, sin = arrays["cos"][:, None], arrays["sin"][:, None]
            y = np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(y.shape)
        if task.rotate:
            y = np.asarray(hadamard(jnp.asarray(y, jnp.float32), task.width), np.float64)
        if task.center:
            y = y - arrays["center"].reshape(-1, 1, task.heads, task.width)
        first = np.broadcast_to(y[:, :1], (len(y), task.filled - task.tokens, *y.shape[2:]))
        return np.concatenate([y, first], axis=1)

    def run(self, what, **more):
        """Arrays that were written, by name."""
        task = dataclasses.replace(self.task, what=what)
        shape = task.videos, task.filled, task.heads
        by_head = shape[0], shape[2], shape[1], task.width
        written = {
            "values": np.zeros(by_head, E4M3)
            if what != PREPARED
            else np.zeros((*shape, task.width), ml_dtypes.bfloat16),
            "exponents": np.full(shape, -99, np.int32),
            "norms": np.full(shape, -1, np.float32),
        }
        arrays = {name: array.copy() for name, array in (self.inputs | more).items()}
        for array in arrays.values():
            array.setflags(write=False)
        arguments = [(arrays | written)[name] for name in task.arguments]
        sizes = {"shared_bytes": 0, "threads": 32 * WARPS, "blocks": BLOCKS}
        ptx_machine.run(program(task), arguments, **sizes, seed=1)
        return written


@pytest.fixture(
    params=[
        {"videos": 1, "tokens": 5, "count": 3, "width": 128},
        {"videos": 2, "tokens": 3, "count": 40, "width": 128, "rotate": False, "center": False},
        {"videos": 2, "tokens": 9, "filled": 12, "count": 33, "width": 64, "eps": None},
        {"videos": 1, "tokens": 2, "count": 2, "width": 64, "rope": False, "rotate": False},
    ],
    ids=str,
)
def case(request, rng):
    return Case(
        rng, **({"eps": 1e-6, "rope": True, "rotate": True, "center": True} | request.param)
    )


def off(values, expected):
    """Largest error of a row, relative to its norm."""
    error = np.linalg.norm(values.astype(np.float64) - expected, axis=-1)
    return (error / np.linalg.norm(expected, axis=-1)).max()


def test_queries_have_an_exponent_each(case):
    y, written = case.expected(), case.run(QUERIES)
    norms = np.linalg.norm(y, axis=-1)
    np.testing.assert_array_equal(written["exponents"], np.floor(np.log2(norms)) - NORM_TOP)
    expected = (y * np.exp2(-written["exponents"].astype(float))[..., None]).swapaxes(1, 2)
    assert off(written["values"], expected) < 2**-4  # three bits behind the first, and subnormals
    exactly = expected.astype(np.float32).astype(E4M3)
    assert (written["values"] == exactly).mean() > 0.999  # sums in another order


def test_norms_and_keys(case):
    y = case.expected()
    norms = case.run(NORMS)["norms"]
    np.testing.assert_allclose(norms, (y**2).sum(axis=-1), rtol=1e-5)
    factor = np.exp2(4 - np.floor(np.log2(np.sqrt(norms.max(axis=1))))).astype(np.float32)
    values = case.run(KEYS, factor=factor)["values"]
    expected = (y * factor[:, None, :, None]).swapaxes(1, 2)
    assert (values == expected.astype(np.float32).astype(E4M3)).mean() > 0.999


def test_bf16_is_rounded_once(case):
    expected = case.expected()
    values = case.run(PREPARED)["values"]
    # A neighbour among bf16 numbers at most; what cancels in a rotation is as exact as its terms.
    np.testing.assert_allclose(
        values.astype(np.float64), expected, rtol=2**-8, atol=1e-5 * abs(expected).max()
    )
    assert (values == expected.astype(np.float32).astype(values.dtype)).mean() > 0.999


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_becomes_nan(rng, bad):
    case = Case(rng, 1, 3, 2, 64, eps=None, rope=True, rotate=True, center=False)
    case.inputs["x"][0, 1, 70] = bad
    values = case.run(QUERIES)["values"].astype(np.float32)
    assert np.isnan(values[0, 1, 1]).all() and np.isfinite(values[0, 0]).all()
    assert np.isfinite(values[0, 1, [0, 2]]).all()


def test_zeros_stay(rng):
    case = Case(rng, 1, 2, 2, 64, eps=1e-6, rope=True, rotate=True, center=False)
    case.inputs["x"][:] = 0
    assert not case.run(QUERIES)["values"].astype(np.float32).any()


@pytest.mark.skipif(not deviceless.is_possible(), reason="needs the extra `aot`")
def test_compiled_for_a_hopper_gpu(tmp_path):
    wan = {"heads": 40, "width": 128}
    cases = [{"what": "queries", **wan}, {"what": "keys", **wan, "videos": 2}]
    cases.append({"what": "queries", "heads": 12, "width": 64, "norm": False})
    cases += [{"what": "values", **wan}, {"what": "prepared", **wan}]
    of_queries, of_keys, *others = deviceless.compiled(tmp_path, cases, "heads")
    assert of_keys.spilled == 0 and not any(one.spilled for one in others)
    assert of_queries.spilled <= 40  # counted twice: five registers, beside 80 of x


@pytest.mark.parametrize(
    "videos, tokens, count, width", [(1, 300, 2, 128), (2, 128, 3, 64), (1, 5, 1, 64)]
)
def test_values(rng, videos, tokens, count, width):
    x = (3 * rng.randn(videos, tokens, count * width)).astype(ml_dtypes.bfloat16)
    x[0, 3, 7] = np.nan
    filled = -(-tokens // 128) * 128
    exponents = rng.randint(-3, 3, (videos, count * width))
    factors = np.exp2(exponents).astype(np.float32)
    factors[0, 7] = np.nan
    task = values_program.Task(
        videos=videos, tokens=tokens, filled=filled, heads=count, width=width, ones=8, warps=WARPS
    )
    out = np.full((videos, count, width + 8, filled), 77, E4M3)
    for array in (x, factors):
        array.setflags(write=False)
    sizes = {"shared_bytes": 0, "threads": 32 * WARPS, "blocks": BLOCKS}
    ptx_machine.run(values_program.program(task), [x, factors, out], **sizes, seed=1)
    scaled = (x.astype(np.float32) * factors[:, None]).reshape(videos, tokens, count, width)
    expected = np.zeros(out.shape, np.float32)
    expected[:, :, :width, :tokens] = scaled.transpose(0, 2, 3, 1)
    expected[0, 0, 7] = np.nan
    expected[:, :, width:, :tokens] = 1
    expected = np.asarray(in_order(jnp.asarray(expected))).clip(-448, 448).astype(E4M3)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gain": jnp.zeros(64)}, r"gain: expected \[128\], got \[64\]"),
        ({"rope": (jnp.zeros((2, 32)), jnp.zeros((3, 32)))}, r"sin: expected \[2, 32\]"),
    ],
)
def test_bad_input_is_an_error(change, message):
    x = Projected(x=jnp.zeros((1, 2, 128), jnp.bfloat16), heads=2, eps=1e-6)
    with pytest.raises(ValueError, match=message):
        heads.queries(dataclasses.replace(x, **change), rotate=False, num_sms=1)


@pytest.mark.parametrize(
    "dtype, channels, count, reason",
    [
        (jnp.float32, 128, 2, "not bfloat16"),
        (jnp.bfloat16, 128, 4, "heads of 32; only 64, 128"),
        (jnp.bfloat16, 5248, 41, "do not fit"),
        (jnp.bfloat16, 5120, 40, None),
    ],
)
def test_what_does_not_fit(dtype, channels, count, reason):
    found = heads.misfit(Projected(x=jnp.zeros((1, 2, channels), dtype), heads=count))
    assert (reason is None and found is None) or reason in found
