"""What every thread does to make queries and keys of a linear's result, as PTX.

A warp has a row, x of a token: lane l has channels l E .. l E + E - 1 of every head, E being
width / 32, so that a head lies across a warp. x is read once and kept; then head by head: norm,
rotary embedding, Hadamard rotation, a vector subtracted, e4m3 with an exponent; all in float32. Or
bf16 right after the embedding.
"""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.mosaic_gpu.ptx import Program, Register, real

WARP = 32
NANS = 0x7F7F7F7F
SIGN = 0x80000000
NOT_FINITE = 255  # exponent bits
BIAS = 127

QUERIES = "queries"  # written with an exponent each, by its own norm
NORMS = "norms"  # written, squared
KEYS = "keys"  # written with an exponent for those of a head that is given
PREPARED = "prepared"  # written in bf16, the heads of a token side by side


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All that the text depends on.

    Attributes:
      what: QUERIES, NORMS, KEYS or PREPARED.
      videos: B.
      tokens: S, of a video.
      filled: tokens that are written of each; the last are like the first.
      heads: H.
      width: of a head, 64 or 128.
      top: of QUERIES, their norms become numbers in [2^top, 2^(top + 1)).
      eps: of the RMS norm over all heads of a token; None: no norm.
      rope: whether pairs of channels are turned.
      rotate: whether heads are multiplied by a Hadamard matrix.
      center: whether something is subtracted, last.
      warps: of a thread block, a multiple of 4; the fewer, the more registers each has.
    """

    what: str
    videos: int
    tokens: int
    filled: int
    heads: int
    width: int
    top: int
    eps: float | None
    rope: bool
    rotate: bool
    center: bool
    warps: int

    @property
    def each(self) -> int:
        """Channels of a lane and head."""
        return self.width // WARP

    @property
    def rows(self) -> int:
        """Tokens of all videos that are written."""
        return self.videos * self.filled

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of what the text calls $0, $1, ...: 64-bit addresses."""
        present = {
            "x": True,
            "gain": self.eps is not None,
            "cos": self.rope,
            "sin": self.rope,
            "center": self.center,
            "factor": self.what == KEYS,
            "values": self.what != NORMS,
            "exponents": self.what == QUERIES,
            "norms": self.what == NORMS,
        }
        return tuple(name for name, is_there in present.items() if is_there)

    def argument(self, name: str) -> str:
        """One of them."""
        return f"${self.arguments.index(name)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Registers with numbers.

    Attributes:
      row: among those that are written.
      token: in its video, likewise.
      video: that it belongs to.
      lane: of this thread.
      source: of the token that is read: another one behind the last.
    """

    row: Register
    token: Register
    video: Register | int
    lane: Register
    source: Register


def program(task: Task) -> str:
    """The text of the whole kernel."""
    p = Program()
    thread = p.let("mov.u32", "%tid.x")
    lane, warp = p.both(thread, WARP - 1), p.shift_right(thread, 5)
    first = p.multiply_add(p.let("mov.u32", "%ctaid.x"), task.warps, warp)
    step = p.multiply_add(p.let("mov.u32", "%nctaid.x"), task.warps, 0)
    # Of each bit of the lane's number 1, or -1 where it is set: then it subtracts itself.
    bits = range(5) if task.rotate else ()
    signs = [p.merge(p.shift_left(lane, 31 - bit), SIGN, real(1)) for bit in bits]

    def row(number: Register) -> None:
        video: Register | int = 0
        token = number
        if task.videos > 1:
            video = p.let("div.u32", number, task.filled)
            token = p.subtract(number, p.multiply_add(video, task.filled, 0))
        source = token
        if task.filled != task.tokens:
            source = p.select(p.less(token, task.tokens), token, 0)
        _row(p, task, Place(number, token, video, lane, source), signs)

    p.strided("ROW", first, task.rows, step, row)
    return p.text()


def _row(p: Program, task: Task, at: Place, signs: Sequence[Register]) -> None:
    words = _load(p, task, at)
    scale = _scale(p, task, words)
    angles = _angles(p, task, at) if task.rope else []
    values = _first_value(p, task, at)
    told = [p.copy(0) for _ in range(-(-task.heads // WARP))]  # lane l: of heads l, l + 32, ...
    for head in range(task.heads):
        p.converge()  # else the compiler overlaps heads until registers spill
        y = [number for word in words[head] for number in _unpacked(p, word)]
        if scale is not None:
            y = [p.let("mul.rn.f32", number, scale) for number in y]
        if task.eps is not None:
            y = _each(p, "mul.rn.f32", y, _channels(p, task, at, "gain", head, 0))
        if task.rope:
            y = _turned(p, y, *angles)
        if task.rotate:
            y = _rotated(p, y, signs)
        if task.center:
            y = _each(p, "sub.rn.f32", y, _channels(p, task, at, "center", head, at.video))
        if task.what == PREPARED:
            assert values is not None
            p.store("global", values, _in_pairs(p, y), 2 * task.width * head)
            continue
        if task.what == KEYS:
            of_video = p.address(task.argument("factor"), _register(p, at.video), 4 * task.heads)
            (factor,) = p.load("global.nc", 1, of_video, 4 * head)
            _write(p, task, values, head, y, factor)
            continue
        norm = p.warp_sum(_sum_of_squares(p, y))
        mine = p.equal(at.lane, head % WARP)
        if task.what == NORMS:
            p.emit("mov.b32", told[head // WARP], norm, when=mine)
            continue
        bits = p.both(p.shift_right(norm, 23), NOT_FINITE)  # without the sign that NaN may have
        # floor(log2 of the root), by halving the exponent of the square, rounded down.
        exponent = p.subtract(p.shift_right(p.add(bits, 1), 1), (BIAS + 1) // 2 + task.top)
        factor = p.shift_left(p.subtract(BIAS, exponent), 23)
        p.emit("mov.b32", told[head // WARP], exponent, when=mine)
        _write(p, task, values, head, y, factor, bad=p.equal(bits, NOT_FINITE))
    if task.what in (QUERIES, NORMS):
        _tell(p, task, at, told)


def _load(p: Program, task: Task, at: Place) -> list[list[Register]]:
    """This lane's channels of every head, pairs of bf16."""
    row = at.source if at.video == 0 else p.multiply_add(at.video, task.tokens, at.source)
    place = p.address(task.argument("x"), row, 2 * task.heads * task.width)
    place = p.address(place, at.lane, 2 * task.each)
    return [
        p.load("global.nc", task.each // 2, place, 2 * task.width * head)
        for head in range(task.heads)
    ]


def _scale(p: Program, task: Task, words: Sequence[Sequence[Register]]) -> Register | None:
    """Of all numbers of a row: what the norm and the Hadamard matrix multiply with."""
    matrix = task.width**-0.5 if task.rotate else 1.0
    if task.eps is None:
        return p.copy(real(matrix)) if task.rotate else None
    numbers = [number for of_head in words for word in of_head for number in p.pair_as_reals(word)]
    mean = p.let(
        "mul.rn.f32", p.warp_sum(_sum_of_squares(p, numbers)), real(1 / (task.heads * task.width))
    )
    inverse = p.let("rsqrt.approx.ftz.f32", p.let("add.rn.f32", mean, real(task.eps)))
    return p.let("mul.rn.f32", inverse, real(matrix)) if task.rotate else inverse


def _angles(p: Program, task: Task, at: Place) -> list[list[Register]]:
    """Cosines and sines of this lane's pairs: the same for all heads."""
    found = []
    for name in ("cos", "sin"):
        place = p.address(task.argument(name), at.source, 2 * task.width)
        place = p.address(place, at.lane, 2 * task.each)
        found.append(p.load("global.nc", task.each // 2, place))
    return found


def _channels(
    p: Program, task: Task, at: Place, name: str, head: int, video: Register | int
) -> list[Register]:
    """Of float32 `[B or 1, H width]`, this lane's."""
    place = p.address(task.argument(name), at.lane, 4 * task.each)
    if video != 0:
        place = p.address(place, _register(p, video), 4 * task.heads * task.width)
    return p.load("global.nc", task.each, place, 4 * task.width * head)


def _turned(
    p: Program, y: Sequence[Register], cosines: Sequence[Register], sines: Sequence[Register]
) -> list[Register]:
    """Pairs of neighbours as complex numbers, times cos + i sin."""
    found = []
    for pair, (cos, sin) in enumerate(zip(cosines, sines, strict=True)):
        a, b = y[2 * pair : 2 * pair + 2]
        found.append(p.let("fma.rn.f32", b, p.differ(sin, SIGN), p.let("mul.rn.f32", a, cos)))
        found.append(p.let("fma.rn.f32", b, cos, p.let("mul.rn.f32", a, sin)))
    return found


def _rotated(p: Program, y: Sequence[Register], signs: Sequence[Register]) -> list[Register]:
    """A head times Sylvester's matrix of ones: sums and differences, first inside of lanes."""
    y = list(y)
    span = 1
    while span < len(y):
        for first in (i for i in range(len(y)) if not i & span):
            a, b = y[first], y[first + span]
            y[first] = p.let("add.rn.f32", a, b)
            y[first + span] = p.let("sub.rn.f32", a, b)
        span *= 2
    for bit, sign in enumerate(signs):
        y = [p.let("fma.rn.f32", own, sign, p.of_lane_across(own, 1 << bit)) for own in y]
    return y


def _first_value(p: Program, task: Task, at: Place) -> Register | None:
    """Where this lane's part of the first head goes, in `[B, H, S, width]`; bf16 `[rows, H width]`.

    None if it goes nowhere.
    """
    if task.what == NORMS:
        return None
    if task.what == PREPARED:
        of_row = p.address(task.argument("values"), at.row, 2 * task.heads * task.width)
        return p.address(of_row, at.lane, 2 * task.each)
    place = p.address(task.argument("values"), at.token, task.width)
    if task.videos > 1:
        of_video = task.heads * task.filled * task.width
        place = p.address(place, _register(p, at.video), of_video)
    return p.address(place, at.lane, task.each)


def _write(
    p: Program,
    task: Task,
    values: Register | None,
    head: int,
    y: Sequence[Register],
    factor: Register,
    bad: str | None = None,
) -> None:
    """y factor as e4m3; NaN where it is bad, because what is too large would become 448."""
    assert values is not None
    scaled = [p.let("mul.rn.f32", number, factor) for number in y]
    pairs = [
        p.let("cvt.u32.u16", p.let("cvt.rn.satfinite.e4m3x2.f32", high, low, kind="h"))
        for low, high in zip(scaled[::2], scaled[1::2], strict=True)
    ]
    word = p.permute(pairs[0], pairs[1], 0x5410) if len(pairs) == 2 else pairs[0]
    if bad:
        word = p.select(bad, NANS, word)
    p.store("global", values, [word], head * task.filled * task.width, size=8 * task.each)


def _in_pairs(p: Program, y: Sequence[Register]) -> list[Register]:
    """Rounded to bf16, two a word."""
    return [
        p.let("cvt.rn.bf16x2.f32", high, low) for low, high in zip(y[::2], y[1::2], strict=True)
    ]


def _tell(p: Program, task: Task, at: Place, told: Sequence[Register]) -> None:
    """Norms or exponents of a row's heads, `[rows, H]`."""
    name = "norms" if task.what == NORMS else "exponents"
    place = p.address(p.address(task.argument(name), at.row, 4 * task.heads), at.lane, 4)
    for number, word in enumerate(told):
        left = task.heads - WARP * number
        when = p.less(at.lane, left) if left < WARP else None
        p.store("global", place, [word], 4 * WARP * number, when=when)


def _sum_of_squares(p: Program, numbers: Sequence[Register]) -> Register:
    total = real(0)
    for number in numbers:
        total = p.let("fma.rn.f32", number, number, total)
    return total


def _each(
    p: Program, instruction: str, a: Sequence[Register], b: Sequence[Register]
) -> list[Register]:
    return [p.let(instruction, x, y) for x, y in zip(a, b, strict=True)]


def _unpacked(p: Program, word: Register) -> list[Register]:
    """As `pair_as_reals`, by other instructions.

    Else the compiler would keep all numbers in registers from the norm on.
    """
    return [p.permute(word, 0, 0x1044), p.permute(word, 0, 0x3244)]


def _register(p: Program, value: Register | int) -> Register:
    return p.copy(value) if isinstance(value, int) else value
