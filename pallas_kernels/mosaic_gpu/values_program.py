"""What every thread does to turn a linear's result into attention's values, as PTX.

A warp takes 128 keys of 16 channels: each lane reads four keys and writes, channel by channel,
the word of e4m3 that holds them, so that a warp writes a channel's 128 keys side by side. Which
four is `attention_operands.in_order`: neighbours there are these here.
"""

import dataclasses

from pallas_kernels.mosaic_gpu.ptx import Program, Register

WARP = 32
CHANNELS = 16  # of a warp: 32 bytes of a token, as many as memory moves at once
NEIGHBOURS = (0, 1, 8, 9)  # keys of a word, counted from its first
ONE = 0x38  # as e4m3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All that the text depends on.

    Attributes:
      videos: B.
      tokens: L, of a video.
      filled: tokens that are written, a multiple of 128; the last are zeros.
      heads: H.
      width: of a head, a multiple of CHANNELS.
      ones: channels of ones behind those of a head.
      warps: of a thread block, a multiple of 4.
    """

    videos: int
    tokens: int
    filled: int
    heads: int
    width: int
    ones: int
    warps: int

    @property
    def parts(self) -> int:
        """Of a head: channels of a warp."""
        return self.width // CHANNELS

    @property
    def units(self) -> int:
        """What warps do in turn: tiles of keys, all heads of a tile together."""
        return self.videos * (self.filled // 128) * self.heads * self.parts


def program(task: Task) -> str:
    """The text of the whole kernel.

    Arguments are x, bf16 `[B, L, H width]`; factors, float32 `[B, H width]`; and the result, e4m3
    `[B, H, width + ones, filled]`.
    """
    p = Program()
    thread = p.let("mov.u32", "%tid.x")
    lane, warp = p.both(thread, WARP - 1), p.shift_right(thread, 5)
    first = p.multiply_add(p.let("mov.u32", "%ctaid.x"), task.warps, warp)
    step = p.multiply_add(p.let("mov.u32", "%nctaid.x"), task.warps, 0)
    # The first key of this lane's word: 2 t + 16 g for lane t + 4 g.
    key = p.multiply_add(p.shift_right(lane, 2), 16, p.shift_left(p.both(lane, 3), 1))
    p.strided("UNIT", first, task.units, step, lambda number: _unit(p, task, number, lane, key))
    return p.text()


def _unit(p: Program, task: Task, number: Register, lane: Register, key: Register) -> None:
    rest, part = _divided(p, number, task.parts)
    rest, head = _divided(p, rest, task.heads)
    video, tile = _divided(p, rest, task.filled // 128)
    token = p.multiply_add(tile, 128, key)
    column = p.multiply_add(part, CHANNELS, p.multiply_add(head, task.width, 0))
    channels = task.heads * task.width

    row = p.multiply_add(video, task.tokens, token)
    place = p.address(p.address("$0", row, 2 * channels), column, 2)
    there, keys = [], []
    for neighbour in NEIGHBOURS:
        there.append(p.less(p.add(token, neighbour), task.tokens))
        words = [p.copy(0) for _ in range(CHANNELS // 2)]
        for at in range(0, len(words), 4):
            offset = 2 * channels * neighbour + 4 * at
            p.load_into(words[at : at + 4], "global.nc", place, offset, when=there[-1])
        keys.append(words)

    of_video = p.address("$1", video, 4 * channels)
    factors = p.address(of_video, column, 4)
    of_head = p.multiply_add(p.multiply_add(video, task.heads, head), task.width + task.ones, 0)
    out = p.address("$2", p.multiply_add(part, CHANNELS, of_head), task.filled)
    out = p.address(out, p.multiply_add(tile, WARP, lane), 4)
    for pair in range(CHANNELS // 2):
        both = [p.pair_as_reals(words[pair]) for words in keys]
        for high, factor in enumerate(p.load("global.nc", 2, factors, 8 * pair)):
            scaled = [p.let("mul.rn.f32", of_key[high], factor) for of_key in both]
            p.store("global", out, [_joined(p, scaled)], (2 * pair + high) * task.filled)

    is_first = p.equal(part, 0)
    ones = p.copy(0)
    for at, exists in enumerate(there):
        p.emit("or.b32", ones, ones, ONE << 8 * at, when=exists)
    behind = p.address("$2", p.add(of_head, task.width), task.filled)
    behind = p.address(behind, p.multiply_add(tile, WARP, lane), 4)
    for channel in range(task.ones):
        p.store("global", behind, [ones], channel * task.filled, when=is_first)


def _divided(p: Program, number: Register, by: int) -> tuple[Register, Register]:
    """Quotient and remainder."""
    quotient = p.let("div.u32", number, by)
    return quotient, p.subtract(number, p.multiply_add(quotient, by, 0))


def _joined(p: Program, numbers: list[Register]) -> Register:
    """Four float32 as e4m3, the first lowest."""
    low, high = (
        p.let("cvt.u32.u16", p.let("cvt.rn.satfinite.e4m3x2.f32", b, a, kind="h"))
        for a, b in (numbers[:2], numbers[2:])
    )
    return p.permute(low, high, 0x5410)
