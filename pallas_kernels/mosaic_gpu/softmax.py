"""Softmax in registers: scores to e4m3 weights without an exponential.

An e4m3 number read as a whole number is a logarithm, eight steps an octave, its mantissa linear
between octaves. So 2^x rounded to e4m3 is x times eight plus a constant, rounded: one multiply-add,
and an addition that leaves the whole number in the low byte of a float32. The mantissa is up to 6 %
off between octaves: with rounding to e4m3, which takes 2.7 %, a weight is 3.1 % off, root mean
square. Whoever divides by the sum of the weights must sum up these very weights.

Weights of a tile are relative to its own largest score, so that each tile uses all of e4m3's range;
what was summed up before is rescaled, downwards or upwards.
"""

from collections.abc import Sequence

from pallas_kernels.mosaic_gpu.ptx import Program, Register, real

TOP = 126  # the code of the largest weight, 448: 127 is NaN
CODES = 128  # below are the codes of positive numbers
REACH = 60  # octaves that a tile may lie below the largest so far: its sums then fit in float32
ROUND = 1.5 * 2.0**16  # plus a number in [0, 1]: rounded to multiples of 1 / CODES, in the low byte


def largest(p: Program, scores: Sequence[Register]) -> Register:
    """Of a row, whose scores four neighbouring lanes hold; NaN if there is one."""
    chains = list(scores[:4])
    for number, score in enumerate(scores[4:]):
        chains[number % 4] = p.let("max.NaN.f32", chains[number % 4], score)
    while len(chains) > 1:
        chains = [p.let("max.NaN.f32", *chains[i : i + 2]) for i in range(0, len(chains), 2)]
    (found,) = chains
    for distance in (1, 2):
        found = p.let("max.NaN.f32", found, p.of_lane_across(found, distance))
    return found


def reference(
    p: Program, highest: Register, seen: Register, before: Register, slope: Register
) -> tuple[Register, Register, Register]:
    """What a tile's weights are relative to.

    Args:
      p: to be continued.
      highest: score of the tile.
      seen: the highest score so far.
      before: the reference so far.
      slope: units of TOP / CODES that a score is worth: octaves * 8 / CODES.
    Returns:
      The highest score from now on, the reference, and what sums so far must be multiplied with.
    """
    seen = p.let("max.NaN.f32", seen, highest)
    reach = p.let("rcp.approx.ftz.f32", slope)
    lowest = p.let("fma.rn.f32", reach, real(-REACH * 8 / CODES), seen)
    now = p.let("max.NaN.f32", highest, lowest)
    octaves = p.let("mul.rn.f32", p.let("sub.rn.f32", before, now), slope)
    octaves = p.let("mul.rn.f32", octaves, real(CODES / 8))
    return seen, now, p.let("ex2.approx.ftz.f32", octaves)


def weigh(p: Program, scores: Sequence[Register], now: Register, slope: Register) -> list[Register]:
    """2^(scores - now) * 448 as e4m3 codes, two in a register; what is too small becomes 0."""
    offset = p.let("fma.rn.f32", p.let("neg.f32", now), slope, real(TOP / CODES))
    parts = [p.let("fma.rn.sat.f32", score, slope, offset) for score in scores]
    codes = [p.let("add.rn.f32", part, real(ROUND)) for part in parts]
    return [p.permute(codes[i], codes[i + 1], 0x1140) for i in range(0, len(codes), 2)]


def insist(p: Program, pairs: Sequence[Register]) -> None:
    """Nothing goes on before these codes are known; the compiler would put them off."""
    both = pairs[0]
    for i in range(1, len(pairs) - 1, 2):
        both = p.let("lop3.b32", both, *pairs[i : i + 2], 0xFE)
    if len(pairs) % 2 == 0:
        both = p.either(both, pairs[-1])
    p.emit("trap", when=f"!{p.less(both, 1 << 15)}")  # there is no such code


def join(p: Program, pairs: Sequence[Register]) -> Register:
    """Two pairs in one register."""
    low, high = pairs
    return p.permute(low, high, 0x5410)
