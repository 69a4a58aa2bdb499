"""The softmax's instructions, run on a CPU, against what they stand for."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import attention_plain, softmax
from pallas_kernels.mosaic_gpu.attention_operands import in_order
from pallas_kernels.mosaic_gpu.ptx import Program
from tests.pallas_kernels.mosaic_gpu.ptx_machine import WARP, run

ROWS, KEYS = 16, 64  # of a warp here; four lanes hold a row, and the one eight below
PAIRS = KEYS // 8  # of a row, in a lane


def lanes(rows):
    """float16 `[ROWS, KEYS]` as lanes hold them: of every eight keys two neighbours, in words."""
    parts = rows.astype(np.float16).reshape(2, 8, KEYS // 8, 4, 2)
    held = np.ascontiguousarray(parts.transpose(1, 3, 0, 2, 4))  # row, lane, half, pair, number
    return held.reshape(WARP, -1).view(np.uint32)


def weigh_on_a_machine(scores, seen, before, slope):
    """Weights e4m3 `[ROWS, KEYS]` in the order of an operand, and the three states `[ROWS]`."""
    p = Program()
    thread = p.copy("%tid.x")
    states = np.stack([seen, before, slope], axis=-1).astype(np.float32).reshape(2, 8, 3)
    states = np.repeat(states.swapaxes(0, 1).reshape(8, 6), 4, axis=0)
    inputs = np.concatenate([lanes(scores), states.view(np.uint32)], axis=1)
    given = p.address("$0", thread, 4 * inputs.shape[1])
    words = [p.load("global.nc", 1, given, 4 * i)[0] for i in range(inputs.shape[1])]
    rows = words[:PAIRS], words[PAIRS : 2 * PAIRS]
    highest = softmax.largest(p, rows)
    results = []
    for row, pairs in enumerate(rows):
        seen_, before_, slope_ = words[2 * PAIRS + 3 * row :][:3]
        one = softmax.half(p, highest, row)
        *found, decay = softmax.reference(p, one, seen_, before_, slope_)
        seen_, offset, both = found
        codes = softmax.weigh(p, pairs, both, softmax.twice(p, slope_, "rn"))
        softmax.insist(p, codes)
        results += [softmax.join(p, codes[i : i + 2]) for i in range(0, PAIRS, 2)]
        results += [seen_, offset, decay]
    at = p.address("$1", thread, 4 * len(results))
    for i, word in enumerate(results):
        p.store("global", at, [word], 4 * i)
    out = np.zeros((WARP, len(results)), np.uint32)
    inputs.flags.writeable = False
    run(p.text(), [inputs, out], shared_bytes=0, threads=WARP)
    out = out.reshape(8, 4, 2, -1).transpose(2, 0, 1, 3).reshape(ROWS, 4, -1)  # row, lane, word
    codes = np.ascontiguousarray(out[:, :, : PAIRS // 2]).view(np.uint8)  # 4 of every 16 keys
    codes = codes.reshape(ROWS, 4, KEYS // 16, 4).swapaxes(1, 2).reshape(ROWS, KEYS)
    states = np.ascontiguousarray(out[:, 0, PAIRS // 2 :]).view(np.float32).T
    return codes.view(ml_dtypes.float8_e4m3fn), states


def by_hand(scores, seen, before, slope):
    scores = jnp.asarray(scores, jnp.float16)
    codes, *states = attention_plain.weigh(scores, *map(jnp.asarray, (seen, before, slope)))
    return np.asarray(attention_plain.join(codes)), np.stack(states)


@pytest.fixture
def given(rng):
    """Ordinary, steep, flat, rising, falling by far, one key, masked keys, equal; others."""
    scores = (200 * rng.randn(ROWS, KEYS)).astype(np.float32)
    slope = np.full(ROWS, 0.002, np.float32)
    slope[1], slope[2], slope[8:] = 3.0, 3e-6, 0.01
    slope = slope.astype(np.float16).astype(np.float32)
    seen = scores.max(axis=1) * slope + 0.01
    seen[4] += 100
    before = 1 - seen + 0.1 * rng.randn(ROWS)
    scores[5, 1:] = scores[6, ::2] = -np.inf
    scores[7] = 4.0
    return scores, seen.astype(np.float32), before.astype(np.float32), slope


def test_instructions_do_what_is_said(given):
    weights, states = weigh_on_a_machine(*given)
    expected, expected_states = by_hand(*given)
    np.testing.assert_allclose(states, expected_states, rtol=1e-5)
    # A weight between two codes may go either way.
    codes, others = (x.view(np.uint8).astype(int) for x in (weights, expected))
    assert abs(codes - others).max() <= 1 and (codes != others).mean() < 0.01
    assert (weights[5].astype(float) > 0).sum() == 1 and not weights[4].astype(float).any()
    assert codes.max() <= softmax.TOP


def test_weights_are_powers_of_two_within_seven_per_cent(given):
    scores, *_, slope = given
    weights, (_, offset, _) = weigh_on_a_machine(*given)
    parts = scores.astype(np.float16).astype(np.float64) * slope[:, None] + offset[:, None]
    exact = np.asarray(in_order(jnp.asarray(np.exp2(softmax.OCTAVES * parts - 7), jnp.float32)))
    got = weights.astype(np.float64)
    seen = exact > 2.0**-5
    ratio = got[seen] / exact[seen]
    assert abs(ratio / ratio.mean() - 1).max() < 0.09 and ratio.std() < 0.035
    assert got[exact < 2.0**-7.5].max() == 0


def test_how_far_off_weights_are():
    """Relative errors, root mean square, over evenly spread octaves: what docs/kernels.md says."""
    codes = np.linspace(24, 120, 100_000)
    exact = np.exp2(codes / 8 - 7)
    straight = np.rint(codes).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    ratios = [
        np.asarray(x, np.float64) / exact for x in (straight, exact.astype(ml_dtypes.float8_e4m3fn))
    ]
    assert [round(100 * (r / r.mean()).std(), 1) for r in ratios] == [3.1, 2.7]


def test_a_nan_is_not_swallowed(given):
    scores, seen, before, slope = given
    scores[3, 17] = scores[12, 40] = np.nan
    _, (highest, now, decay) = weigh_on_a_machine(scores, seen, before, slope)
    for state in (highest, now, decay):
        assert np.flatnonzero(np.isnan(state)).tolist() == [3, 12]


def test_codes_that_cannot_be_stop_the_kernel():
    p = Program()
    codes = [softmax.ROUND, softmax.ROUND | 5, softmax.ROUND | 0x80, softmax.ROUND]
    softmax.insist(p, [p.copy(code) for code in codes])
    with pytest.raises(AssertionError, match="a trap"):
        run(p.text(), [np.zeros(1, np.uint32)], shared_bytes=0, threads=WARP)
