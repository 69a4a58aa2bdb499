"""Queries and keys in one pass: the program run on a CPU, and compiled for an H100."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import heads
from pallas_kernels.mosaic_gpu.attention_operands import NORM_TOP
from pallas_kernels.mosaic_gpu.heads_program import KEYS, NORMS, QUERIES, Task, program
from sdq.rotate import hadamard
from tests.pallas_kernels import deviceless
from tests.pallas_kernels.mosaic_gpu import ptx_machine

E4M3 = ml_dtypes.float8_e4m3fn
BLOCKS, WARPS = 2, 4


class Case:
    """Inputs of a task, and what they should become, `[B, S, H, D]` in float64."""

    def __init__(self, rng, videos, tokens, count, width, **steps):
        channels = count * width
        self.task = Task(
            what=QUERIES,
            videos=videos,
            tokens=tokens,
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
        return y

    def run(self, what, **more):
        """Arrays that were written, by name."""
        names = ("videos", "tokens", "heads", "width", "top", "eps", "rope", "rotate", "center")
        task = Task(what=what, warps=WARPS, **{name: getattr(self.task, name) for name in names})
        shape = task.videos, task.tokens, task.heads
        written = {
            "values": np.zeros((shape[0], shape[2], shape[1], task.width), E4M3),
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
        {"videos": 2, "tokens": 9, "count": 33, "width": 64, "eps": None},
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
    of_queries, of_keys, small = deviceless.compiled(tmp_path, cases, "heads")
    assert of_keys.spilled == small.spilled == 0
    assert of_queries.spilled <= 40  # counted twice: five registers, beside 80 of x


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.zeros((1, 2, 128), jnp.float32)}, "x: expected bfloat16"),
        ({"heads": 4}, "expected heads of 64 or 128, got 32"),
        ({"x": jnp.zeros((1, 2, 5248), jnp.bfloat16), "heads": 41}, "do not fit"),
        ({"norm": heads.Norm(jnp.zeros(64), 1e-6)}, "gain: expected float32"),
        ({"rope": heads.Rope(jnp.zeros((2, 32)), jnp.zeros((3, 32)))}, "sin: expected float32"),
    ],
)
def test_bad_input_is_an_error(change, message):
    arguments = {"x": jnp.zeros((1, 2, 128), jnp.bfloat16), "heads": 2, "num_sms": 1}
    with pytest.raises(ValueError, match=message):
        heads.queries(**(arguments | change))
