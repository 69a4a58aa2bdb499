"""A builder of PTX text: what a thread does, one instruction a line.

For kernels whose every instruction counts, written as functions that take a Program and registers
by name. The text is also what tests run on a CPU, instruction by instruction, so that a kernel's
bits are known before a GPU is.
"""

from collections.abc import Callable, Sequence

import numpy as np

Register = str
Operand = str | int
ALL_LANES = 0xFFFFFFFF

_TYPES = {"r": ".b32", "d": ".b64", "h": ".b16", "p": ".pred"}


class Program:
    """Text in the making. Every method that returns a register appends one instruction."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._counts = dict.fromkeys(_TYPES, 0)

    def text(self) -> str:
        """The whole program, in a scope of its own."""
        registers = [
            f".reg {_TYPES[kind]} {kind}<{count + 1}>;" for kind, count in self._counts.items()
        ]
        return "\n".join(["{", *registers, *self._lines, "}"])

    def new(self, kind: str = "r") -> Register:
        """A register nobody has yet: "r" of 32 bits, "d" of 64, "h" of 16, "p" for a condition."""
        self._counts[kind] += 1
        return f"{kind}{self._counts[kind]}"

    def emit(
        self, instruction: str, *operands: Operand | Sequence[Operand], when: str | None = None
    ) -> None:
        """Append an instruction; `when` names a condition, "!p1" its opposite."""
        guard = f"@{when} " if when else ""
        written = ", ".join(map(_written, operands))
        self._lines.append(f"{guard}{instruction} {written}".rstrip() + ";")

    def let(self, instruction: str, *operands: Operand, kind: str = "r") -> Register:
        """A new register with an instruction's result."""
        result = self.new(kind)
        self.emit(instruction, result, *operands)
        return result

    # ---- numbers of 32 bits

    def copy(self, a: Operand) -> Register:
        """a."""
        return self.let("mov.b32", a)

    def add(self, a: Operand, b: Operand) -> Register:
        """a + b."""
        return self.let("add.s32", a, b)

    def subtract(self, a: Operand, b: Operand) -> Register:
        """a - b."""
        return self.let("sub.s32", a, b)

    def multiply_add(self, a: Operand, b: Operand, c: Operand) -> Register:
        """a b + c."""
        return self.let("mad.lo.s32", a, b, c)

    def both(self, a: Operand, b: Operand) -> Register:
        """Bitwise and."""
        return self.let("and.b32", a, b)

    def either(self, a: Operand, b: Operand) -> Register:
        """Bitwise or."""
        return self.let("or.b32", a, b)

    def differ(self, a: Operand, b: Operand) -> Register:
        """Bitwise exclusive or."""
        return self.let("xor.b32", a, b)

    def merge(self, a: Operand, mask: int, b: Operand) -> Register:
        """(a & mask) | b."""
        return self.let("lop3.b32", a, mask, b, 0xEA)

    def shift_right(self, a: Operand, by: int) -> Register:
        """Zeros come in on the left."""
        return self.let("shr.u32", a, by)

    def shift_left(self, a: Operand, by: int) -> Register:
        """Zeros come in on the right."""
        return self.let("shl.b32", a, by)

    def larger(self, a: Operand, b: Operand) -> Register:
        """The maximum, unsigned."""
        return self.let("max.u32", a, b)

    def smaller(self, a: Operand, b: Operand) -> Register:
        """The minimum, unsigned."""
        return self.let("min.u32", a, b)

    def permute(self, low: Operand, high: Operand, selector: Operand) -> Register:
        """Four of the eight bytes of (low, high), named by the selector's low four nibbles."""
        return self.let("prmt.b32", low, high, selector)

    def select(self, condition: str, a: Operand, b: Operand) -> Register:
        """A where the condition holds, else b."""
        return self.let("selp.b32", a, b, condition)

    def half_times(self, a: Register, half: int, by: int, plus: Operand) -> Register:
        """One half of a, 0 the lower, times 0 <= by < 256, plus something: one instruction."""
        assert 0 <= by < 256
        return self.let("dp2a.lo.u32.u32", a, by << (8 * half), plus)

    # ---- pairs of bf16 numbers

    def pair_larger_magnitude(self, a: Register, b: Register) -> Register:
        """max(|a|, |b|) of each half, NaN where there is one; the signs mean nothing."""
        return self.let("max.NaN.xorsign.abs.bf16x2", a, b)

    def pair_as_reals(self, word: Register) -> list[Register]:
        """Both as float32, the lower half first."""
        return [self.shift_left(word, 16), self.both(word, 0xFFFF0000)]

    def pair_multiply_add(self, a: Register, b: Register, c: Register) -> Register:
        """a b + c of each half, rounded once. Takes no constants."""
        return self.let("fma.rn.bf16x2", a, b, c)

    # ---- between the lanes of a warp

    def warp_maximum(self, a: Register) -> Register:
        """The largest of all lanes, unsigned."""
        return self.let("redux.sync.max.u32", a, ALL_LANES)

    def of_lane_across(self, a: Register, distance: int) -> Register:
        """The register of the lane whose number differs in one bit."""
        return self.let("shfl.sync.bfly.b32", a, distance, 31, ALL_LANES)

    def warp_sum(self, a: Register) -> Register:
        """Of all lanes' float32, the same in every lane."""
        for distance in (16, 8, 4, 2, 1):
            a = self.let("add.rn.f32", a, self.of_lane_across(a, distance))
        return a

    def multiply_tiles(
        self, a: Sequence[Operand], b: Sequence[Operand], onto: Sequence[Register]
    ) -> list[Register]:
        """onto + A B on tensor cores: bf16 A `[16, K]`, B `[K, 8]`, float32 sums `[16, 8]`.

        K is 8 times the words of B that a lane has, one or two; of A it has twice as many. Of lane
        l, g = l / 4 and t = l mod 4: a has pairs at rows g, g + 8, and again for the other columns,
        2 t and 2 t + 1, then 8 later; b those of column g. It gets the sums at row g and columns
        2 t and 2 t + 1, then those at row g + 8.
        """
        assert len(a) == 2 * len(b)
        sums = [self.new() for _ in onto]
        shape = f"m16n8k{8 * len(b)}"
        self.emit(f"mma.sync.aligned.{shape}.row.col.f32.bf16.bf16.f32", sums, a, b, onto)
        return sums

    def converge(self) -> None:
        """The warp's lanes wait for each other; the compiler moves nothing across."""
        self.emit("bar.warp.sync", ALL_LANES)

    # ---- memory that comes while the program goes on

    def initialise_arrival(self, at: Register, offset: int, *, when: str) -> None:
        """A barrier of 8 bytes of shared memory: a phase is one `expect` and the bytes it names."""
        self.emit("mbarrier.init.shared::cta.b64", _at(at, offset), 1, when=when)

    def expect(self, arrival: Register, size: int, *, when: str) -> None:
        """The barrier's phase is over when so many bytes have come."""
        self.emit(
            "mbarrier.arrive.expect_tx.shared::cta.b64", "_", _at(arrival, 0), size, when=when
        )

    def fetch(
        self,
        to: Register,
        offset: int,
        source: Register,
        size: int,
        arrival: Register,
        *,
        when: str,
    ) -> None:
        """Let bytes come from global to shared memory, both addresses multiples of 16."""
        self.emit(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
            _at(to, offset),
            _at(source, 0),
            size,
            _at(arrival, 0),
            when=when,
        )

    def wait(self, name: str, arrival: Register, phase: Register) -> None:
        """Until a phase of the barrier is over: 0, then 1, then 0 again, ..."""
        self.label(name)
        over = self.let(
            "mbarrier.try_wait.parity.shared::cta.b64", _at(arrival, 0), phase, kind="p"
        )
        self.jump(name, when=f"!{over}")

    # ---- conditions, addresses, memory

    def both_hold(self, a: str, b: str) -> str:
        """The condition that both do."""
        return self.let("and.pred", a, b, kind="p")

    def equal(self, a: Operand, b: Operand) -> str:
        """The condition a == b."""
        return self.let("setp.eq.u32", a, b, kind="p")

    def less(self, a: Operand, b: Operand) -> str:
        """The condition a < b, unsigned."""
        return self.let("setp.lt.u32", a, b, kind="p")

    def address(self, base: Operand, index: Register, stride: int) -> Register:
        """64 bits: base + index * stride."""
        return self.let("mad.wide.u32", index, stride, base, kind="d")

    def select_address(self, condition: str, a: Operand, b: Operand) -> Register:
        """64 bits: a where the condition holds, else b."""
        return self.let("selp.b64", a, b, condition, kind="d")

    def load(self, space: str, count: int, address: Register, offset: int = 0) -> list[Register]:
        """New registers with 1, 2 or 4 words of "global", "global.nc" or "shared"."""
        words = [self.new() for _ in range(count)]
        self.load_into(words, space, address, offset)
        return words

    def load_into(
        self,
        words: Sequence[Register],
        space: str,
        address: Register,
        offset: int = 0,
        when: str | None = None,
    ) -> None:
        """The same into registers that exist."""
        target: Operand | Sequence[Operand] = words if len(words) > 1 else words[0]
        self.emit(f"ld.{space}{_width(len(words))}.b32", target, _at(address, offset), when=when)

    def load_byte_into(
        self,
        word: Register,
        space: str,
        address: Register,
        offset: int = 0,
        when: str | None = None,
    ) -> None:
        """One byte, zeros above it, into a register that exists."""
        self.emit(f"ld.{space}.u8", word, _at(address, offset), when=when)

    def store(
        self,
        space: str,
        address: Register,
        words: Sequence[Operand],
        offset: int = 0,
        *,
        size: int = 32,
        when: str | None = None,
    ) -> None:
        """1, 2 or 4 words to "global" or "shared"; or the low `size` bits of one."""
        source: Operand | Sequence[Operand] = words if len(words) > 1 else words[0]
        self.emit(
            f"st.{space}{_width(len(words))}.b{size}", _at(address, offset), source, when=when
        )

    # ---- control

    def label(self, name: str) -> None:
        """A place to jump to."""
        self._lines.append(f"{name}:")

    def jump(self, label: str, when: str | None = None) -> None:
        """Go on at a label."""
        self.emit("bra", label, when=when)

    def strided(
        self, name: str, first: Register, end: int, step: Operand, body: Callable[[Register], None]
    ) -> None:
        """For index = first, first + step, ... below end; the body may jump to `{name}_NEXT`."""
        index = self.copy(first)
        self.label(f"{name}_LOOP")
        self.jump(f"{name}_END", when=f"!{self.less(index, end)}")
        body(index)
        self.label(f"{name}_NEXT")
        self.emit("add.s32", index, index, step)
        self.jump(f"{name}_LOOP")
        self.label(f"{name}_END")


def real(number: float) -> str:
    """A float32 constant as PTX writes it."""
    return f"0f{np.float32(number).view(np.uint32):08X}"


def _written(operand: Operand | Sequence[Operand]) -> str:
    if isinstance(operand, str):
        return operand
    if isinstance(operand, int):
        return str(operand)
    return "{" + ", ".join(map(_written, operand)) + "}"


def _at(address: Register, offset: int) -> str:
    return f"[{address}+{offset}]" if offset else f"[{address}]"


def _width(count: int) -> str:
    return f".v{count}" if count > 1 else ""
