"""The quantiser's program, run on a CPU, against `sdq.quantize`: every bit."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sdq
from pallas_kernels.mosaic_gpu import quantizer, quantizer_program
from pallas_kernels.mosaic_gpu.config import SHARED_MEMORY
from pallas_kernels.mosaic_gpu.quantizer import Norm, SubFormatbooks
from pallas_kernels.mosaic_gpu.quantizer_norm import arranged
from pallas_kernels.mosaic_gpu.quantizer_tables import bias, element_table
from pallas_kernels.mosaic_gpu.quantizer_task import (
    WARP,
    WORDS_HELD,
    Config,
    Task,
    default_config,
    words_held,
)
from pallas_kernels.mosaic_gpu.tables import look_up_table
from pallas_kernels.rows import deinterleave, interleave
from sdq import formatbook, formats
from tests.pallas_kernels import deviceless
from tests.pallas_kernels.mosaic_gpu import ptx_machine

LARGEST = (33, 5152)
E4M3 = jnp.float8_e4m3fn


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
    return x


def dequantised(values, exponents):
    """float32, in the order of channels."""
    return np.asarray(deinterleave(values.astype(np.float32))) * np.exp2(
        exponents.astype(np.float32)
    )


def expected(x, fmt, allowed=None, largest=LARGEST):
    """Of sdq; in arrays of one shape, for which it is compiled once."""
    count, length = x.shape
    rows, columns = largest or x.shape
    x = np.pad(x, ((0, rows - count), (0, columns - length)))
    if allowed is not None:
        wide = np.full((rows, columns // fmt.block, 8), 0xFF, np.uint8)
        wide[:count, : length // fmt.block] = allowed
        allowed = jnp.asarray(wide)
    rule = "two_stage" if fmt.has_choice else None
    q = sdq.quantize(jnp.asarray(x), fmt, select=rule, allowed=allowed)
    values, exponents = sdq.to_fp8(q)
    values = np.asarray(interleave(values))[:count, :length]
    return [
        values,
        np.asarray(exponents)[:count],
        np.asarray(q.scales)[:count, : length // fmt.block],
    ]


def run(x, task, books=None, group=None, tokens=None, modulation=None, *, blocks=2, seed=None):
    """What the emitted text leaves in memory."""
    counts = [count for count in (task.rows, task.residuals) if count]
    outputs = []
    for count in counts:
        values = np.full((count, task.length), 0xEE, np.uint8)
        outputs += [values.view(ml_dtypes.float8_e4m3fn), np.full((count, 1), 0x77, np.int8)]
    if task.metadata:
        outputs.append(np.full((sum(counts), task.blocks), 0xEE, np.uint8))
    own = task.length - task.more
    inputs = [x[:, :own], element_table(task.book), look_up_table(task.format)]
    inputs += [x[:, own:]] if task.more else []
    inputs += [part for part in (books, group, tokens, modulation) if part is not None]
    ptx_machine.run(
        quantizer_program.program(task),
        [*map(np.ascontiguousarray, inputs), *outputs],
        shared_bytes=task.shared_bytes,
        threads=task.config.warps * WARP,
        blocks=blocks,
        seed=seed,
    )
    parts = outputs[: 2 * len(counts)]
    joined = [np.concatenate(parts[first::2]) for first in (0, 1)]
    return joined + outputs[len(parts) :]


def check(got, want):
    np.testing.assert_array_equal(got[1], want[1])
    if len(got) == 3:
        np.testing.assert_array_equal(got[2], want[2])
    np.testing.assert_array_equal(got[0].view(np.uint8), want[0].view(np.uint8))


def task_of(
    shape,
    fmt,
    *,
    metadata=True,
    books=0,
    residuals=0,
    eps=None,
    batch=1,
    activation=None,
    more=0,
    **config,
):
    return Task(
        rows=shape[0],
        length=shape[1],
        format=formats.parse(fmt),
        config=Config(**{"threads": 32, "warps": 4, **config}),
        metadata=metadata,
        books=books,
        residuals=residuals,
        eps=eps,
        batch=batch,
        activation=activation,
        more=more,
    )


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("book", ["sdq32", "dialectfp4", "e2m1"])
def test_every_bit_is_sdqs(book, block, rng):
    task = task_of((33, 608), f"{book}:{block}")
    x = rows(33, 608, rng)
    check(run(x, task), expected(x, task.format))


@pytest.mark.parametrize(
    "length, fmt, config",
    [
        (32, "sdq32:16", {}),  # most lanes have nothing
        (1024, "sdq32:16", {"exchange": False}),
        (1120, "sdq32:16", {"exchange": False, "columns": 4}),
        (1120, "sdq32:16", {"threads": 64, "columns": 1}),
        (1056, "dialectfp4:16", {"threads": 128, "warps": 8, "columns": 8}),
        (2080, "sdq32:16", {"threads": 128}),  # one warp of four has a second block
        (3328, "sdq32:32", {"threads": 64, "columns": 2}),
        (3072, "sdq32:16", {"threads": 96, "warps": 12}),  # numbers of three warps
        (5120, "sdq32:16", {"threads": 160, "warps": 20}),  # of five
        (5152, "e2m1:16", {"threads": 256, "warps": 8}),
        (2080, "e2m1:16", {"threads": 128, "columns": 1}),  # a table of 520 bytes
    ],
)
def test_rows_of_any_length(length, fmt, config, rng):
    task = task_of((17, length), fmt, **config)
    x = rows(17, length, rng)
    check(run(x, task, blocks=3), expected(x, task.format))


@pytest.mark.parametrize(
    "length, more, fmt, threads",
    [
        (1120, 800, "sdq32:16", 32),  # x ends in the middle of a slot
        (1120, 96, "sdq32:16", 32),  # in the last, which not all have
        (2080, 1056, "sdq32:32", 32),  # between two
        (2080, 32, "sdq32:16", 128),
    ],
)
def test_channels_in_two_arrays(length, more, fmt, threads, rng):
    task = task_of((17, length), fmt, threads=threads, more=more, residuals=2)
    x, tokens = rows(17, length, rng), np.array([3, 0], np.int32)
    alone = dataclasses.replace(task, more=0)
    check(run(x, task, tokens=tokens), run(x, alone, tokens=tokens))


def test_the_default_cut(rng):
    config = default_config(1536, 16)
    task = task_of((20, 1536), "sdq32:16", **dataclasses.asdict(config))
    x = rows(20, 1536, rng)
    check(run(x, task, blocks=1), expected(x, task.format))


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_rows_than_a_block_takes(count, rng):
    task = task_of((count, 64), "sdq32:32")
    x = rows(16, 64, rng)[-count:]
    check(run(x, task), expected(x, task.format))


def test_metadata_is_optional(rng):
    task = task_of((16, 96), "sdq32:16", metadata=False)
    x = rows(16, 96, rng)
    values, exponents, _ = expected(x, task.format)
    check(run(x, task), [values, exponents])


@pytest.mark.parametrize("fmt", ["sdq32:16", "sdq32:32", "dialectfp4:16"])
@pytest.mark.parametrize("by_block", [False, True])
def test_sub_formatbooks(fmt, by_block, rng):
    x = rows(24, 1120, rng)
    blocks = 1120 // formats.parse(fmt).block
    task = task_of(x.shape, fmt, books=blocks if by_block else 1)
    shapes = task.book.shapes
    books = rng.randint(1, 1 << shapes, (5, task.books, 8)).astype(np.uint8)
    books[0] |= 0xF0  # bits of no shape mean nothing
    books[-1] = (1 << shapes) - 1
    group = rng.randint(0, 5, 24).astype(np.int32)
    check(run(x, task, books, group), expected(x, task.format, books[group]))


@pytest.mark.parametrize(
    "fmt, shared",
    [("sdq32:16", False), ("sdq32:32", True), ("dialectfp4:16", True), ("e2m1:16", False)],
)
def test_residuals(fmt, shared, rng):
    """More rows: what is left over, chosen freely even where the rows themselves were not."""
    x = rows(24, 608, rng)
    tokens = np.array([23, 0, 17, 5, 5, 8, 22, 12, 15, 16], np.int32)
    task = task_of(x.shape, fmt, books=int(shared), residuals=len(tokens))
    books = group = allowed = None
    if shared:
        books = np.left_shift(1, rng.randint(0, task.book.shapes, (5, 1, 8))).astype(np.uint8)
        group = rng.randint(0, 5, 24).astype(np.int32)
        allowed = books[group]
    want = expected(x, task.format, allowed)
    base = dequantised(*want[:2])
    left = x.astype(np.float32) - base
    left_rounded = left.astype(ml_dtypes.bfloat16)
    good = want[1][:, 0] != -128
    np.testing.assert_array_equal(left[good], left_rounded[good].astype(np.float32))
    more = expected(left_rounded[tokens], task.format)
    more[2] = np.where(good[tokens, None], more[2], 0)
    got = run(x, task, books, group, tokens)
    got[2][24:] = np.where(good[tokens, None], got[2][24:], 0)
    check(got, [np.concatenate(parts) for parts in zip(want, more, strict=True)])


@pytest.mark.parametrize(
    "length, fmt, threads, batch, mean",
    [
        (608, "sdq32:16", 32, 1, 1),
        (2080, "sdq32:16", 64, 3, 1),
        (1056, "sdq32:32", 32, 2, 1),
        (5120, "sdq32:16", 128, 1, -100),  # many times the spread
        (5120, "sdq32:16", 160, 1, 1),
    ],
)
def test_norm_in_front(length, fmt, threads, batch, mean, rng):
    """As after a norm in float64, but where that lies next to the border of two bf16 numbers."""
    x = (3 * rng.standard_normal((12, length)) + mean).astype(ml_dtypes.bfloat16)
    x[5] = 7
    x[7, 3], x[8, 1] = np.nan, np.inf
    x[9] = np.linspace(1e30, 3e30, length)
    gain, shift = rng.standard_normal((2, batch, length)).astype(np.float32)
    tokens = np.array([11, 5, 2], np.int32)
    cut = {"threads": threads, "warps": 4 * threads // math.gcd(threads, 128)}
    task = task_of(x.shape, fmt, **cut, residuals=3, eps=1e-6, batch=batch)
    got = run(x, task, None, None, tokens, arranged(gain, shift, task))
    with np.errstate(invalid="ignore"):  # of infinities
        centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + 1e-6)
    normed[9] = 0  # as `layer_norm` says, whose squares are float32: infinite
    each = [np.repeat(part, 12 // batch, axis=0) for part in (gain, shift)]
    normed = (normed * each[0] + each[1]).astype(ml_dtypes.bfloat16)
    want = expected(normed, task.format)
    base = dequantised(*want[:2])
    left = (normed.astype(np.float32) - base).astype(ml_dtypes.bfloat16)[tokens]
    want = [np.concatenate(parts) for parts in zip(want, expected(left, task.format), strict=True)]
    np.testing.assert_array_equal(got[1], want[1])
    assert np.mean(got[0].view(np.uint8) != want[0].view(np.uint8)) < 1e-3


@pytest.mark.parametrize("length, threads", [(608, 32), (2080, 64)])
def test_gelu_in_front(length, threads, rng):
    """As after a GELU in float64, but where that lies next to the border of two bf16 numbers."""
    x = (2 * rng.standard_normal((12, length))).astype(ml_dtypes.bfloat16)
    x[5], x[6, :3], x[7, 3] = 0, (1e30, -1e30, 3e38), np.nan
    tokens = np.array([11, 5, 2], np.int32)
    task = task_of(x.shape, "sdq32:16", threads=threads, residuals=3, activation="gelu")
    got = run(x, task, None, None, tokens)
    wide = x.astype(np.float64)
    gelu = wide / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
    gelu = gelu.astype(ml_dtypes.bfloat16)
    want = expected(gelu, task.format)
    left = (gelu.astype(np.float32) - dequantised(*want[:2])).astype(ml_dtypes.bfloat16)[tokens]
    want = [np.concatenate(parts) for parts in zip(want, expected(left, task.format), strict=True)]
    np.testing.assert_array_equal(got[1], want[1])
    values = [part[0].astype(np.float32) for part in (got, want)]  # zeros of either sign
    assert np.mean((values[0] != values[1]) & ~np.isnan(values[1])) < 1e-3


@pytest.mark.parametrize(
    "count, length, threads, eps",
    [(29, 1056, 64, None), (3, 608, 32, None), (1, 64, 32, 1e-6), (10, 5120, 128, 1e-6)],
)
def test_rows_come_when_their_place_is_free(count, length, threads, eps, rng):
    """At once or as late as can be; rows whose residual is wanted, bad ones too, after a norm."""
    x = rows(32, length, rng)[-count:]
    tokens = rng.randint(0, count, 5).astype(np.int32)
    task = task_of(x.shape, "sdq32:16", threads=threads, residuals=5, eps=eps)
    gain, shift = rng.standard_normal((2, 1, length)).astype(np.float32)
    modulation = None if eps is None else arranged(gain, shift, task)
    late, *others = (
        run(x, task, None, None, tokens, modulation, blocks=1, seed=seed) for seed in (None, 1, 2)
    )
    for one in others:
        check(one, late)


@pytest.mark.parametrize("seed", range(3))
def test_warps_may_race(seed, rng):
    """Rows of several warps, one after the other, in different interleavings."""
    task = task_of((29, 1056), "sdq32:32", threads=64)
    x = rows(29, 1056, rng)
    check(run(x, task, blocks=1, seed=seed), expected(x, task.format))


def without_turns_of_maxima(lines):
    """A fast warp overwrites what a slow one still needs."""
    (own,) = {line for line in lines if re.fullmatch(r"xor.b32 (r\d+), \1, (?!1;)\d+;", line)}
    return [line for line in lines if line != own]


def without_waiting_for_a_row(lines):
    """Its place still holds what was there before."""
    return [line for line in lines if not line.endswith("bra ARRIVAL;")]


def fetched_before_the_others_have_read(lines):
    """In front of the barrier behind which all of a row's threads are done with its place."""

    def after(at, name):
        return next(i for i in range(at, len(lines)) if name in lines[i])

    barrier = after(lines.index("ARRIVAL:"), "bar.sync")
    first, last = after(barrier, "xor.b32") + 1, after(barrier, "cp.async.bulk")
    fetch = lines[first : last + 1]
    return lines[:barrier] + fetch + lines[barrier:first] + lines[last + 1 :]


@pytest.mark.parametrize(
    "mistake",
    [without_turns_of_maxima, without_waiting_for_a_row, fetched_before_the_others_have_read],
)
def test_the_machine_sees_a_race(mistake, rng, monkeypatch):
    task = task_of((29, 1056), "sdq32:32", threads=64)
    lines = quantizer_program.program(task).splitlines()
    racing = "\n".join(mistake(lines))
    assert racing != "\n".join(lines)
    monkeypatch.setattr(quantizer_program, "program", lambda _: racing)
    x = rows(29, 1056, rng)
    want = expected(x, task.format)

    def goes_wrong(seed):
        try:
            check(run(x, task, blocks=1, seed=seed), want)
        except AssertionError:  # perhaps the machine's: a warp that missed a row waits for ever
            return True
        return False

    assert any(map(goes_wrong, range(4)))


@pytest.mark.parametrize("name", formatbook.BOOKS)
def test_element_table_holds_the_books_tables(name):
    book = formatbook.BOOKS[name]
    tops = [top - formatbook.FIRST_TOP for top in book.tops]
    table = element_table(book)[:, 1:].astype(np.int64)
    errors = formatbook.coarse_shape_errors(book)[tops]
    index = formatbook.index_table(book).reshape(8, 4, -1)[tops]
    packed = table[..., 0] + bias(book.shapes)
    for shape in range(book.shapes):
        np.testing.assert_array_equal((table[..., 1] >> 8 * shape) & 255, index[:, shape])
        if shape:
            field = (packed >> (10 * shape - 8)) & 1023
            np.testing.assert_array_equal(field - 512, errors[..., shape])
    np.testing.assert_array_equal(element_table(book)[:, 0], element_table(book)[:, 1])


def test_default_cut_holds_every_row():
    assert [default_config(k, 16).threads for k in (1536, 5120, 8960, 13824)] == [
        *(32, 160, 128, 128)
    ]
    every = itertools.product(("sdq32:16", "sdq32:32"), (False, True), range(32, 28672, 32))
    for fmt, norm, length in every:
        task = task_of((1, length), fmt)
        config = default_config(length, task.block, norm=norm)
        assert words_held(length, task.block, config.threads) <= max(WORDS_HELD.values())
        assert dataclasses.replace(task, config=config).shared_bytes <= SHARED_MEMORY


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"threads": 48}, "threads: expected whole warps that divide 512, got 48"),
        ({"threads": 0}, "threads: expected whole warps"),
        ({"threads": 160}, "threads: expected whole warps that divide 512"),
        ({"threads": 1024}, "threads: expected whole warps that divide 512"),
        ({"warps": 6}, "warps: expected a multiple of 4"),
        ({"columns": 32}, "columns: expected a power of two up to 16"),
        ({"threads": 64, "warps": 32}, "threads: at most 15 rows"),
    ],
)
def test_impossible_cuts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_more_rows_than_shared_memory_holds():
    x = jnp.zeros((64, 8192), jnp.bfloat16)
    with pytest.raises(ValueError, match="config: 12 rows of K = 8192"):
        quantizer.quantize(
            x, formats.parse("sdq32:16"), config=Config(threads=32, warps=12), num_sms=1
        )


def abstract(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(x, options):
    """For an H100, where there is none."""
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)

    def call(x, options):
        norm = Norm(*options["norm"], eps=1e-6) if "norm" in options else None
        options = options | {"metadata": True, "num_sms": 132, "norm": norm}
        return quantizer.quantize(x, formats.parse("sdq32:16"), **options)

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.export.export(jax.jit(call), platforms=["cuda"])(x, options)


@pytest.mark.parametrize("everything", [False, True])
def test_lowers_for_a_gpu(everything):
    options = {}
    if everything:
        options = {
            "sub_formatbooks": SubFormatbooks(
                abstract((5, 38, 8), jnp.uint8), abstract((100,), jnp.int32)
            ),
            "residual_of": abstract((10,), jnp.int32),
            "norm": [abstract((2, 608), jnp.float32)] * 2,
        }
    out = lowered(abstract((100, 608)), options).out_avals
    counts = [100, 10] if everything else [100]
    rows = [((n, width), dtype) for n in counts for width, dtype in ((608, E4M3), (1, jnp.int8))]
    assert [(part.shape, part.dtype) for part in out] == [*rows, ((sum(counts), 38), jnp.uint8)]


@pytest.mark.skipif(not deviceless.is_possible(), reason="needs the extra `aot`")
def test_compiled_for_a_hopper_gpu(tmp_path):
    residuals = {"books": 1, "residuals": 3276}
    cases = [
        *({"m": 32760, "k": k} for k in (1536, 3072, 5120, 8960, 13824)),
        {"m": 32760, "k": 5120, "exchange": False, "metadata": False},
        *(
            {"m": 32760, "k": k, "books": k // 16, "residuals": 3276, "batch": 1, "metadata": False}
            for k in (1536, 3072, 5120)
        ),
        *(
            {"m": 32760, "k": k, "batch": batch, "metadata": False}
            for k in (1536, 3072, 5120)
            for batch in (1, 2)
        ),
        {"m": 32760, "k": 13824, "format": "sdq32:32"},
        {"m": 33, "k": 28672, "format": "e2m1:16"},
        {"m": 32760, "k": 5120} | residuals,
        {"m": 32760, "k": 13824, "books": 864, "residuals": 3276},
        {"m": 32760, "k": 13824, "books": 864, "residuals": 3276, "activation": "gelu"},
        {"m": 32760, "k": 5120, "batch": 2, "format": "sdq32:32"} | residuals,
        {"m": 32760, "k": 8960, "batch": 1},
        {"m": 76544, "k": 15360, "more": 12288},
    ]
    for case, report in zip(cases, deviceless.compiled(tmp_path, cases, "quantizer"), strict=True):
        assert report.spilled == 0, case
        if report.instructions:
            needed = {"HFMA2", "IDP", "LDS", "PRMT", "REDUX"} | (
                {"HMMA"} if "batch" in case else set()
            )
            assert needed <= report.instructions, case


def test_no_rows():
    out = quantizer.quantize(
        jnp.zeros((0, 64), jnp.bfloat16), formats.parse("sdq32:16"), metadata=True, num_sms=1
    )
    assert out.rows.shape == (0, 64) and out.metadata.shape == (0, 4)


SUB = "sub_formatbooks"


def sub_of(books, group):
    return SubFormatbooks(abstract(books, jnp.uint8), abstract(group, jnp.int32))


@pytest.mark.parametrize(
    "x, fmt, options, error, message",
    [
        (((4, 64), jnp.float32), "sdq32:16", {}, ValueError, "x: expected bfloat16"),
        (((64,),), "sdq32:16", {}, ValueError, "x: expected bfloat16"),
        (((4, 64),), "sdq32:16", {"more": abstract((4, 48))}, ValueError, "more: expected bfloat"),
        (((4, 48),), "sdq32:16", {}, NotImplementedError, "K = 48: must be a multiple of 32"),
        (((4, 64),), "mxfp4", {}, NotImplementedError, "only dialect formats"),
        (((4, 1 << 16),), "sdq32:16", {}, NotImplementedError, "K = 65536: does not fit"),
        (((4, 64),), "e2m1:16", {SUB: sub_of((2, 1, 8), (4,))}, ValueError, "nothing to choose"),
        (((4, 64),), "sdq32:16", {SUB: sub_of((2, 2, 8), (4,))}, ValueError, r"books: expected ui"),
        (((4, 64),), "sdq32:16", {SUB: sub_of((2, 4, 8), (5,))}, ValueError, r"group: expected in"),
        (
            ((4, 64),),
            "sdq32:16",
            {"residual_of": abstract((2,))},
            ValueError,
            r"residual_of: expected int32\[n\], got bfloat16\[2\]",
        ),
        (
            ((0, 64),),
            "sdq32:16",
            {"residual_of": abstract((2,), jnp.int32)},
            ValueError,
            "residual_of: 2 rows of an x that has none",
        ),
        (
            ((4, 64),),
            "sdq32:16",
            {"norm": Norm(abstract((1, 64)), abstract((1, 64)), 1e-6)},
            ValueError,
            r"gain: expected float32\[B, 64\], got bfloat16\[1, 64\]",
        ),
        (
            ((4, 64),),
            "sdq32:16",
            {"norm": Norm(*[abstract((3, 64), jnp.float32)] * 2, 1e-6)},
            ValueError,
            "norm: 4 rows are not 3 equal parts",
        ),
    ],
)
def test_refusals(x, fmt, options, error, message):
    with pytest.raises(error, match=message):
        quantizer.quantize(abstract(*x), formats.parse(fmt), num_sms=132, **options)
