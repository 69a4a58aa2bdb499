"""The softmax's instructions, run on a CPU, against what they stand for."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import attention_plain, softmax
from pallas_kernels.mosaic_gpu.attention_operands import in_order
from pallas_kernels.mosaic_gpu.ptx import Program
from tests.pallas_kernels.mosaic_gpu.ptx_machine import WARP, run

ROWS, KEYS = 8, 64  # of a warp here; four lanes hold a row
EACH = KEYS // 4


def lanes(rows):
    """`[ROWS, KEYS]` as lanes hold them: of every eight keys of its row, two neighbours."""
    parts = rows.reshape(ROWS, KEYS // 8, 4, 2)
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(WARP, EACH))


def weigh_on_a_machine(scores, seen, before, slope):
    """Weights e4m3 `[ROWS, KEYS]` in the order of an operand, and the three states `[ROWS]`."""
    p = Program()
    thread = p.copy("%tid.x")
    given = p.address("$0", thread, 4 * (EACH + 3))
    words = [p.load("global.nc", 1, given, 4 * i)[0] for i in range(EACH + 3)]
    *mine, seen_, before_, slope_ = words
    found = softmax.reference(p, softmax.largest(p, mine), seen_, before_, slope_)
    pairs = softmax.weigh(p, mine, found[1], slope_)
    softmax.insist(p, pairs)
    joined = [softmax.join(p, pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
    at = p.address("$1", thread, 4 * (EACH // 4 + 3))
    for i, word in enumerate([*joined, *found]):
        p.store("global", at, [word], 4 * i)
    states = np.repeat(np.stack([seen, before, slope], axis=-1), 4, axis=0)
    inputs = np.concatenate([lanes(scores), states], axis=1).astype(np.float32)
    out = np.zeros((WARP, EACH // 4 + 3), np.uint32)
    inputs.flags.writeable = False
    run(p.text(), [inputs, out], shared_bytes=0, threads=WARP)
    codes = np.ascontiguousarray(out[:, : EACH // 4]).view(np.uint8)  # 4 of every 16 keys
    codes = codes.reshape(ROWS, 4, KEYS // 16, 4).swapaxes(1, 2).reshape(ROWS, KEYS)
    return codes.view(ml_dtypes.float8_e4m3fn), out[::4, EACH // 4 :].view(np.float32).T


def by_hand(scores, seen, before, slope):
    codes, *states = attention_plain.weigh(*map(jnp.asarray, (scores, seen, before, slope)))
    return np.asarray(attention_plain.join(codes)), np.stack(states)


@pytest.fixture
def given(rng):
    """Eight rows: ordinary, steep, flat, rising, falling by far, one key, masked keys, equal."""
    scores = (5 * rng.randn(ROWS, KEYS)).astype(np.float32)
    slope = np.full(ROWS, 0.01, np.float32)
    slope[1], slope[2] = 3.0, 1e-5
    before = scores.max(axis=1) + np.array([0, 1, 2, -3, 9000, 0, 1, 0], np.float32)
    seen = before + np.float32(0.5)
    scores[5, 1:] = scores[6, ::2] = -np.inf
    scores[7] = 4.0
    return scores, seen, before, slope


def test_instructions_do_what_is_said(given):
    weights, states = weigh_on_a_machine(*given)
    expected, expected_states = by_hand(*given)
    np.testing.assert_allclose(states, expected_states, rtol=1e-5)
    # A weight between two codes may go either way.
    codes, others = (x.view(np.uint8).astype(int) for x in (weights, expected))
    assert abs(codes - others).max() <= 1 and (codes != others).mean() < 0.01
    assert (weights[5].astype(float) > 0).sum() == 1 and not weights[4].astype(float).any()


def test_weights_are_powers_of_two_within_seven_per_cent(given):
    scores, *_, slope = given
    weights, (_, now, _) = weigh_on_a_machine(*given)
    octaves = (scores - now[:, None]).astype(np.float64) * slope[:, None] * softmax.CODES / 8
    exact = np.asarray(in_order(jnp.asarray(np.exp2(octaves), jnp.float32)))
    got = weights.astype(np.float64) / 2.0**8.75
    seen = exact > 2.0**-13.5
    ratio = got[seen] / exact[seen]
    assert abs(ratio / ratio.mean() - 1).max() < 0.09 and ratio.std() < 0.035
    assert got[exact < 2.0**-16].max() == 0


def test_how_far_off_weights_are():
    """Relative errors, root mean square, over evenly spread octaves: what docs/kernels.md says."""
    codes = np.linspace(24, softmax.TOP, 100_000)
    exact = np.exp2(codes / 8 - 7)
    straight = np.rint(codes).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    ratios = [
        np.asarray(x, np.float64) / exact for x in (straight, exact.astype(ml_dtypes.float8_e4m3fn))
    ]
    assert [round(100 * (r / r.mean()).std(), 1) for r in ratios] == [3.1, 2.7]


def test_a_nan_is_not_swallowed(given):
    scores, seen, before, slope = given
    scores[3, 17] = np.nan
    _, (highest, now, decay) = weigh_on_a_machine(scores, seen, before, slope)
    for state in (highest, now, decay):
        assert np.flatnonzero(np.isnan(state)).tolist() == [3]


def test_codes_that_cannot_be_stop_the_kernel():
    p = Program()
    softmax.insist(p, [p.copy(0), p.copy(5), p.copy(0x8000), p.copy(1)])
    with pytest.raises(AssertionError, match="a trap"):
        run(p.text(), [np.zeros(1, np.uint32)], shared_bytes=0, threads=WARP)
