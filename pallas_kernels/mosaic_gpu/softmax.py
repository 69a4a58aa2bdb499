"""Softmax in registers: scores to e4m3 weights without an exponential, two at a time.

An e4m3 number read as a whole number is a logarithm, eight steps an octave, its mantissa linear
between octaves. So 2^x rounded to e4m3 is x times eight plus a constant, rounded: one multiply-add,
and an addition that leaves the whole number in the low byte of a float16. The mantissa is up to 6 %
off between octaves: with rounding to e4m3, which takes 2.7 %, a weight is 3.1 % off, root mean
square. Whoever divides by the sum of the weights must sum up these very weights.

Scores are float16, as the tensor cores hand them over: two neighbours in a register, so that every
instruction does two. They are counted in units that are worth, times a row's slope, CODES codes.

Weights of a tile are relative to its own largest score, so that each tile uses all of e4m3's range;
what was summed up before is rescaled, downwards or upwards.
"""

from collections.abc import Sequence

from pallas_kernels.mosaic_gpu.ptx import Program, Register, real

TOP = 125  # the code of the largest weight, 416: 127 is NaN
CODES = 128  # below are the codes of positive numbers
OCTAVES = CODES // 8  # that they span
REACH = 60  # octaves that a tile may lie below the largest so far: its sums then fit in float32
FAR = 1e30  # before the first tile: the highest score is -FAR, the offset FAR
ROUND = 0x48004800  # 8, twice: plus a number in [0, 1], rounded to multiples of 1 / CODES
TOO_LARGE = 0x00800080  # bits that only codes from CODES on have


def largest(p: Program, rows: Sequence[Sequence[Register]]) -> Register:
    """Of two rows, whose scores four neighbouring lanes hold, in a register; NaN if there is one.

    Args:
      p: to be continued.
      rows: of each its pairs of scores.
    """

    def larger(a: Register, b: Register) -> Register:
        return p.let("max.NaN.f16x2", a, b)

    found = []
    for pairs in rows:
        chains = list(pairs[:2])
        for number, pair in enumerate(pairs[2:]):
            chains[number % 2] = larger(chains[number % 2], pair)
        found.append(larger(chains[0], chains[1]))
    first, second = found
    low, high = (p.permute(first, second, halves) for halves in (0x5410, 0x7632))
    both = larger(low, high)
    for distance in (1, 2):
        both = larger(both, p.of_lane_across(both, distance))
    return both


def half(p: Program, pair: Register, number: int) -> Register:
    """One half of a register, 0 the lower, as float32."""
    bits = p.shift_right(pair, 16) if number else pair
    return p.let("cvt.f32.f16", p.let("cvt.u16.u32", bits, kind="h"))


def twice(p: Program, number: Register, rounding: str) -> Register:
    """A float32 number as float16, in both halves of a register."""
    bits = p.let("cvt.u32.u16", p.let(f"cvt.{rounding}.f16.f32", number, kind="h"))
    return p.permute(bits, bits, 0x1010)


def reference(
    p: Program, highest: Register, seen: Register, before: Register, slope: Register
) -> tuple[Register, Register, Register, Register]:
    """What a tile's weights are relative to: weight codes are CODES (score slope + offset).

    Args:
      p: to be continued.
      highest: score of the tile.
      seen: the highest score so far, times the slope.
      before: the offset so far.
      slope: a float16 number.
    Returns:
      The highest score from now on, the offset, that offset as a pair, and what sums so far must be
      multiplied with.
    """
    highest = p.let("mul.rn.f32", highest, slope)
    seen = p.let("max.NaN.f32", seen, highest)
    lowest = p.let("add.rn.f32", seen, real(-REACH / OCTAVES))
    now = p.let("max.NaN.f32", highest, lowest)
    # Rounded down, so that no code exceeds TOP; what is taken is the rounded one throughout.
    pair = twice(p, p.let("sub.rn.f32", real(TOP / CODES), now), "rm")
    offset = half(p, pair, 0)
    octaves = p.let("mul.rn.f32", p.let("sub.rn.f32", offset, before), real(OCTAVES))
    return seen, offset, pair, p.let("ex2.approx.ftz.f32", octaves)


def weigh(
    p: Program, pairs: Sequence[Register], offset: Register, slope: Register
) -> list[Register]:
    """Codes of weights, in the low bytes of both halves; what is too small becomes 0."""
    parts = [p.let("fma.rn.sat.f16x2", pair, slope, offset) for pair in pairs]
    eight = p.copy(ROUND)
    return [p.let("add.rn.f16x2", part, eight) for part in parts]


def insist(p: Program, pairs: Sequence[Register]) -> None:
    """Nothing goes on before these codes are known; the compiler would put them off."""
    both = pairs[0]
    for i in range(1, len(pairs) - 1, 2):
        both = p.let("lop3.b32", both, *pairs[i : i + 2], 0xFE)
    if len(pairs) % 2 == 0:
        both = p.either(both, pairs[-1])
    p.emit("trap", when=f"!{p.equal(p.both(both, TOO_LARGE), 0)}")  # there is no such code


def join(p: Program, pairs: Sequence[Register]) -> Register:
    """The codes of two pairs in one register."""
    first, second = pairs
    return p.permute(first, second, 0x6420)
