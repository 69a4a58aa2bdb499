"""The quantiser's program, run on a CPU, against `sdq.quantize`: every bit."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sdq
from pallas_kernels.mosaic_gpu import quantiser_program
from pallas_kernels.mosaic_gpu.operands import interleave, look_up_table
from pallas_kernels.mosaic_gpu.quantiser_program import WARP, Config, Task
from pallas_kernels.mosaic_gpu.quantiser_tables import element_table
from sdq import formats

from tests.pallas_kernels.mosaic_gpu import ptx_machine


def rows(count, length, rng):
    """bf16 `[count, length]`, count >= 16: every kind of row that could go wrong."""
    x = rng.standard_normal((count, length))
    eighth = count // 8
    x[eighth : 2 * eighth] = rng.standard_t(2, (eighth, length)) * np.exp(
        2 * rng.standard_normal((1, length))
    )
    far_apart = np.exp2(rng.randint(-40, 40, (eighth, length // 16)).repeat(16, axis=1))
    x[2 * eighth : 3 * eighth] *= far_apart
    x[3 * eighth : 4 * eighth] *= np.exp2(rng.randint(-130, 120, (eighth, 1)).astype(float))
    x[4 * eighth : 5 * eighth] = np.round(8 * x[4 * eighth : 5 * eighth]) / 4  # ties
    special = x[5 * eighth :]
    special[0] = -0.0
    special[1, : length // 2] = 0
    special[2] = 3.3e38 * np.sign(special[2])
    special[3] = 1e-40  # subnormal
    x = x.astype(ml_dtypes.bfloat16)
    x[-1, 5] = np.nan
    x[-2, -1] = np.inf
    x[-2, 3] *= 100
    return x


def expected(x, fmt, allowed=None):
    rule = "two_stage" if fmt.has_choice else None
    q = sdq.quantize(jnp.asarray(x), fmt, select=rule, allowed=allowed)
    values, exponents = sdq.to_fp8(q)
    return [np.asarray(part) for part in (interleave(values), exponents, q.scales)]


def run(x, task, books=None, group=None, *, blocks=2, seed=None):
    """What the emitted text leaves in memory."""
    outputs = [
        np.full(x.shape, 0xEE, np.uint8).view(ml_dtypes.float8_e4m3fn),
        np.full((task.rows, 1), 0x77, np.int8),
    ]
    if task.metadata:
        outputs.append(np.full((task.rows, task.blocks), 0xEE, np.uint8))
    inputs = [x, element_table(task.book), look_up_table(task.format)]
    if task.books:
        inputs += [books, group]
    ptx_machine.run(
        quantiser_program.program(task),
        inputs + outputs,
        shared_bytes=task.shared_bytes,
        threads=task.config.warps * WARP,
        blocks=blocks,
        seed=seed,
    )
    return outputs


def check(got, want):
    np.testing.assert_array_equal(got[1], want[1])
    if len(got) == 3:
        np.testing.assert_array_equal(got[2], want[2])
    np.testing.assert_array_equal(got[0].view(np.uint8), want[0].view(np.uint8))


def task_of(shape, fmt, *, metadata=True, books=0, **config):
    return Task(
        rows=shape[0],
        length=shape[1],
        format=formats.parse(fmt),
        config=Config(**{"threads": 32, "warps": 4, **config}),
        metadata=metadata,
        books=books,
    )


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("book", ["sdq32", "dialectfp4", "e2m1"])
def test_every_bit_is_sdqs(book, block, rng):
    task = task_of((33, 608), f"{book}:{block}")
    x = rows(33, 608, rng)
    check(run(x, task), expected(x, task.format))
