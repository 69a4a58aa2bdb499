"""Runs PTX text on a CPU: every thread of a block, instruction by instruction, in numpy.

Knows the instructions that `pallas_kernels.mosaic_gpu.ptx` writes. Checks what a GPU would not
tell: every access is aligned and inside its array, lanes that exchange registers are together,
barriers meet, registers are written before they are read (they begin as garbage). What is fetched
comes when somebody waits for it; with a seed perhaps at once.

Threads at one instruction run together. In lock step the one furthest behind goes first; with a
seed, warps race: after every barrier a random one runs ahead as far as it can.
"""

import functools
import re

import ml_dtypes
import numpy as np

GAP = 256  # bytes between arrays, which nobody may touch
SHARED_BEGINS = 1024
GARBAGE = 0xABABABAB
WARP = 32
JUMP_BACK = 1 << 20
LINE = re.compile(r"(?:@(!?\w+) )?([\w.:]+) ?(.*);$")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def run(text, arrays, *, shared_bytes, threads, blocks=1, seed=None):
    """Run a program whose $0, $1, ... are the arrays, and then shared memory; they change in place.

    Arrays are contiguous; `blocks` thread blocks run one after the other.
    """
    memory = Memory(arrays)
    instructions, labels = _parsed(text)
    rng = None if seed is None else np.random.default_rng(seed)
    for block in range(blocks):
        machine = Machine(instructions, labels, memory, shared_bytes, threads, rng)
        machine.set("%ctaid.x", block)
        machine.set("%nctaid.x", blocks)
        machine.run()
    memory.copy_back(arrays)


class Memory:
    """One address space with forbidden gaps between arrays."""

    def __init__(self, arrays=(), *, begins=4096, size=0):
        sizes = [array.nbytes for array in arrays] or [size]
        padded = [begins] + [-(-size // GAP) * GAP + GAP for size in sizes]
        self.begins = np.cumsum(padded)[:-1]
        self.bytes = np.full(sum(padded), 0xDD, np.uint8)
        self.open = np.zeros(sum(padded), bool)
        for begin, size in zip(self.begins, sizes, strict=True):
            self.open[begin : begin + size] = True
        for begin, array in zip(self.begins, arrays, strict=False):
            self.bytes[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)

    def copy_back(self, arrays):
        for begin, array in zip(self.begins, arrays, strict=True):
            if array.flags.writeable:
                flat = array.reshape(-1).view(np.uint8)
                flat[:] = self.bytes[begin : begin + array.nbytes]

    def at(self, address, count, size):
        """Checked: a view of the memory in units of size bytes, and indices `[lanes, count]`."""
        assert (address % np.uint64(count * size) == 0).all(), "misaligned"
        first = (address // np.uint64(size)).astype(np.int64)
        index = first[:, None] + np.arange(count)
        assert index.size == 0 or (index.max() + 1) * size <= self.bytes.size, "far outside"
        assert self.open[index * size].all(), "outside every array"
        return self.bytes.view(f"u{size}"), index


class Machine:
    """A thread block."""

    def __init__(self, instructions, labels, memory, shared_bytes, threads, rng):
        self.instructions, self.labels = instructions, labels
        self.meeting_places = set(labels.values())
        self.memory = {"global": memory, "shared": Memory(begins=SHARED_BEGINS, size=shared_bytes)}
        self.threads, self.rng = threads, rng
        self.registers = {}
        self.place = np.zeros(threads, np.int64)
        self.turns = np.zeros(threads, np.int64)  # jumps back: who is behind whom
        self.rank = np.zeros(threads, np.int64)
        self.waiting = np.full(threads, -1)
        self.arrivals = {}
        self.vain = 0  # polls since something happened
        for number, begin in enumerate(memory.begins):
            self.set(f"${number}", begin)
        self.set(f"${len(memory.begins)}", SHARED_BEGINS)
        self.set("%tid.x", np.arange(threads))

    def set(self, name, value):
        self.registers[name] = np.full(self.threads, value, np.uint64)

    def run(self):
        end = len(self.instructions)
        while (left := self.place < end).any():
            ready = left & (self.waiting < 0)
            assert ready.any(), "everybody waits"
            order = (self.rank * JUMP_BACK + self.turns) * JUMP_BACK + self.place
            first = np.where(ready, order, np.iinfo(np.int64).max)
            self.run_together(np.nonzero(first == first.min())[0])

    def run_together(self, lanes):
        """Up to where they may part, meet others or have to wait."""
        place = self.place[lanes[0]]
        while place < len(self.instructions):
            guard, name, operands = self.instructions[place]
            place += 1
            self.place[lanes] = place
            self.step(name, operands, self.guarded(guard, lanes))
            if name == "bra" or name.startswith("bar") or place in self.meeting_places:
                return

    def guarded(self, guard, lanes):
        if not guard:
            return lanes
        holds = self.value(guard.lstrip("!"), lanes) != 0
        return lanes[holds ^ guard.startswith("!")]

    def step(self, name, operands, lanes):
        if not lanes.size:
            return
        kind = name.split(".")
        assert name != "trap", "a trap"
        if kind[0] == "bra":
            target = self.labels[operands[0]]
            self.turns[lanes] += target < self.place[lanes]
            self.place[lanes] = target
        elif kind[0] == "bar":
            self.barrier(kind[1], operands, lanes)
        elif kind[0] in ("ld", "st"):
            self.access(kind, operands, lanes)
        elif kind[0] in ("redux", "shfl"):
            self.exchange(kind[0], operands, lanes)
        elif kind[0] == "mma":
            self.multiply_tiles(operands, lanes)
        elif kind[0] == "mbarrier":
            self.arrival(kind[1], operands, lanes)
        elif name.startswith("cp.async.bulk.shared"):
            self.fetch(operands, lanes)
        elif kind[0] == "fence":
            pass
        else:
            constants = any(isinstance(operand, int) for operand in operands)
            assert not ("f16x2" in name and constants), f"{name} takes no constants"
            values = [self.value(operand, lanes) for operand in operands[1:]]
            self.put(operands[0], lanes, OPERATIONS[name](*values))

    def value(self, operand, lanes):
        if isinstance(operand, int):
            return np.full(lanes.size, operand % 2**64, np.uint64)
        return self.registers[operand][lanes]

    def put(self, name, lanes, value):
        register = self.registers.setdefault(name, np.full(self.threads, GARBAGE, np.uint64))
        register[lanes] = value if name.startswith("d") else value & np.uint64(0xFFFFFFFF)

    def barrier(self, kind, operands, lanes):
        if kind == "warp":
            self.check_whole_warps(lanes)
            return
        number = self.value(operands[0], lanes).astype(np.int64)
        count = operands[1] if len(operands) > 1 else self.threads
        assert (number < 16).all()
        self.waiting[lanes] = number
        for each in np.unique(number):
            arrived = np.nonzero(self.waiting == each)[0]
            assert arrived.size <= count, "too many at a barrier"
            if arrived.size == count:
                self.waiting[arrived] = -1
                self.turns[arrived] = self.turns[arrived].max()  # they go on together
        if self.rng is not None:
            self.rank = np.repeat(self.rng.permutation(self.threads // WARP), WARP)

    def arrival(self, kind, operands, lanes):
        place = operands[1] if kind in ("arrive", "try_wait") else operands[0]
        addresses = self.address(place, lanes)
        if kind == "try_wait":
            self.poll(operands, addresses, lanes)
            return
        for address in addresses.tolist():
            if kind == "init":
                assert address % 8 == 0 and operands[1] == 1
                self.arrivals[address] = Arrival()
            else:
                self.arrivals[address].expect(operands[2])

    def poll(self, operands, addresses, lanes):
        """Whoever waits in vain goes last; what is on its way comes now."""
        answers = []
        for address, phase in zip(addresses.tolist(), self.value(operands[2], lanes), strict=True):
            self.arrivals[address].come()
            answers.append(self.arrivals[address].phase != phase)
        self.put(operands[0], lanes, np.array(answers, np.uint64))
        in_vain = lanes[~np.array(answers)]
        self.rank[in_vain] = self.rank.max() + 1
        self.vain = self.vain + 1 if in_vain.size else 0
        assert self.vain < 100 * self.threads, "waits for what nobody fetches"

    def fetch(self, operands, lanes):
        to, source, size, arrival = operands
        places = [self.address(name, lanes).astype(np.int64) for name in (to, source, arrival)]
        for into, begin, at in zip(*(place.tolist() for place in places), strict=True):
            assert into % 16 == begin % 16 == size % 16 == 0, "misaligned"
            self.arrivals[at].fetch(size, functools.partial(self.copy_in, into, begin, size))
            if self.rng is not None and self.rng.random() < 0.5:
                self.arrivals[at].come()

    def copy_in(self, into, begin, size):
        shared, memory = self.memory["shared"], self.memory["global"]
        assert memory.open[begin : begin + size].all(), "outside every array"
        assert shared.open[into : into + size].all(), "outside shared memory"
        shared.bytes[into : into + size] = memory.bytes[begin : begin + size]

    def address(self, operand, lanes):
        base, _, offset = operand.strip("[]").partition("+")
        return self.value(_operand(base), lanes) + np.uint64(int(offset or 0) % 2**64)

    def access(self, kind, operands, lanes):
        size = int(kind[-1][1:]) // 8
        target, data = reversed(operands) if kind[0] == "ld" else operands
        registers = [_operand(name.strip()) for name in str(data).strip("{}").split(",")]
        address = self.address(target, lanes)
        if "shared" in kind:
            address &= np.uint64(0xFFFFFFFF)
        memory = self.memory["shared" if "shared" in kind else "global"]
        view, index = memory.at(address, len(registers), size)
        for number, name in enumerate(registers):
            if kind[0] == "ld":
                self.put(name, lanes, view[index[:, number]].astype(np.uint64))
            else:
                view[index[:, number]] = self.value(name, lanes).astype(view.dtype)

    def exchange(self, kind, operands, lanes):
        self.check_whole_warps(lanes)
        values = self.value(operands[1], lanes).reshape(-1, WARP)
        if kind == "redux":
            values = np.repeat(values.max(axis=1, keepdims=True), WARP, axis=1)
        else:
            values = values[:, np.arange(WARP) ^ operands[2]]
        self.put(operands[0], lanes, values.reshape(-1))

    def multiply_tiles(self, operands, lanes):
        """bf16 tiles, their product and what it is added to rounded once to float32."""
        self.check_whole_warps(lanes)
        d, a, b, c = ([name.strip() for name in text.strip("{}").split(",")] for text in operands)
        g, t = np.divmod(np.arange(WARP), 4)

        def tile(shape, dtype, names, places):
            found = np.zeros((lanes.size // WARP, *shape))
            for name, place in zip(names, places, strict=True):
                words = self.value(name, lanes).astype(np.uint32).reshape(-1, WARP, 1).view(dtype)
                for half, (row, column) in enumerate(place):
                    found[:, row, column] = words[..., half]
            return found

        halves = [8 * number + 2 * t for number in range(len(b))]
        of_a = [[(g + up, k), (g + up, k + 1)] for k in halves for up in (0, 8)]
        of_b = [[(k, g), (k + 1, g)] for k in halves]
        sums = [[(g + up, 2 * t + odd)] for up in (0, 8) for odd in (0, 1)]
        with np.errstate(all="ignore"):
            product = tile((16, 8 * len(b)), ml_dtypes.bfloat16, a, of_a) @ tile(
                (8 * len(b), 8), ml_dtypes.bfloat16, b, of_b
            )
            result = (product + tile((16, 8), np.float32, c, sums)).astype(np.float32)
        for name, [(row, column)] in zip(d, sums, strict=True):
            bits = result[:, row, column].reshape(-1).view(np.uint32)
            self.put(name, lanes, bits.astype(np.uint64))

    def check_whole_warps(self, lanes):
        assert (np.bincount(lanes // WARP, minlength=1) % WARP == 0).all(), "lanes are missing"


class Arrival:
    """A barrier for what is fetched: one `expect` a phase."""

    def __init__(self):
        self.phase, self.expected, self.copies = 0, None, []

    def expect(self, size):
        assert self.expected is None, "expected twice"
        self.expected = size

    def fetch(self, size, copy):
        self.copies.append((size, copy))

    def come(self):
        for size, copy in self.copies:
            copy()
            self.expected -= size
        self.copies = []
        if self.expected == 0:
            self.phase, self.expected = 1 - self.phase, None


def _parsed(text):
    instructions, labels = [], {}
    for line in text.splitlines()[1:-1]:
        if line.startswith(".reg"):
            continue
        if line.endswith(":"):
            assert line[:-1] not in labels
            labels[line[:-1]] = len(instructions)
            continue
        guard, name, operands = LINE.match(line).groups()
        instructions.append((guard, name, [_operand(text) for text in OPERAND.findall(operands)]))
    return instructions, labels


def _operand(text):
    if text.startswith("0f"):
        return int(text[2:], 16)
    return int(text) if re.match(r"-?\d", text) else text


def _words(*values):
    return [value.astype(np.uint32) for value in values]


def _permute(low, high, selector):
    low, high, selector = _words(low, high, selector)
    stack = np.stack([low, high], axis=-1).view(np.uint8)  # [lanes, 8]
    nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
    picked = np.take_along_axis(stack, (nibbles & 7).astype(np.int64), axis=1)
    signs = np.where(picked & 128, 255, 0).astype(np.uint8)
    picked = np.where(nibbles & 8, signs, picked)
    return picked.view(np.uint32)[:, 0].astype(np.uint64)


def _by_halves(function):
    """An operation on 16 bits as one on both halves of a word."""

    def both(*values):
        halves = [value.astype(np.uint32)[:, None].view(np.uint16) for value in values]
        return np.ascontiguousarray(function(*halves)).view(np.uint32)[:, 0].astype(np.uint64)

    return both


def _larger_magnitude(a, b):
    magnitude = np.maximum(a & 0x7FFF, b & 0x7FFF)
    magnitude = np.where(magnitude > 0x7F80, 0x7FFF, magnitude)
    return (magnitude | ((a ^ b) & 0x8000)).astype(np.uint16)


def _on_halves(dtype, function):
    """An operation on both halves; of three, products are exact, and so is every sum near a tie."""

    def bits(*values):
        with np.errstate(all="ignore"):
            result = function(*(value.view(dtype).astype(np.float64) for value in values))
            return result.astype(dtype).view(np.uint16)

    return _by_halves(bits)


def _on_reals(function):
    """An operation on float32 bits, rounded once more than float64 is."""

    def bits(*values):
        reals = [value.astype(np.uint32).view(np.float32).astype(np.float64) for value in values]
        with np.errstate(all="ignore"):
            return np.float32(function(*reals)).view(np.uint32).astype(np.uint64)

    return bits


def _half(bits):
    return bits.astype(np.uint16).view(np.float16)


def _to_half(bits, down):
    real = bits.astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        near = real.astype(np.float16)
        if down:
            near = np.where(near > real, np.nextafter(near, np.float16(-np.inf)), near)
    return near.view(np.uint16).astype(np.uint64)


def _pair_of_reals(high, low):
    reals = np.stack(_words(low, high), axis=-1).view(np.float32)
    with np.errstate(all="ignore"):
        return reals.astype(ml_dtypes.bfloat16).view(np.uint32)[:, 0].astype(np.uint64)


def _pair_of_e4m3(high, low):
    reals = np.stack(_words(low, high), axis=-1).view(np.float32)
    bytes_ = np.clip(reals, -448, 448).astype(ml_dtypes.float8_e4m3fn)  # NaN stays
    return bytes_.view(np.uint16)[:, 0].astype(np.uint64)


def _half_times(a, by, plus):
    low = (a & np.uint64(0xFFFF)) * (by & np.uint64(0xFF))
    return low + (a >> np.uint64(16)) * ((by >> np.uint64(8)) & np.uint64(0xFF)) + plus


def _on_words(function):
    """An operation on unsigned numbers of 32 bits, which may come as negative constants."""
    mask = np.uint64(0xFFFFFFFF)
    return lambda *values: np.asarray(function(*(value & mask for value in values)), np.uint64)


def _logic(a, b, c, function):
    (kind,) = set(function.tolist())
    return {0xEA: (a & b) | c, 0xFE: a | b | c}[kind]


OPERATIONS = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "mad.wide.u32": lambda a, b, c: (a & np.uint64(0xFFFFFFFF)) * (b & np.uint64(0xFFFFFFFF)) + c,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "shr.u32": _on_words(np.right_shift),
    "shl.b32": _on_words(np.left_shift),
    "max.u32": _on_words(np.maximum),
    "min.u32": _on_words(np.minimum),
    "popc.b32": _on_words(np.bitwise_count),
    "setp.eq.u32": _on_words(np.equal),
    "setp.lt.u32": _on_words(np.less),
    "and.pred": lambda a, b: a & b,
    "selp.b32": lambda a, b, condition: np.where(condition != 0, a, b),
    "selp.b64": lambda a, b, condition: np.where(condition != 0, a, b),
    "lop3.b32": _logic,
    "prmt.b32": _permute,
    "div.u32": _on_words(np.floor_divide),
    "add.rn.f32": _on_reals(np.add),
    "sub.rn.f32": _on_reals(np.subtract),
    "mul.rn.f32": _on_reals(np.multiply),
    "fma.rn.f32": _on_reals(lambda a, b, c: a * b + c),
    "max.NaN.f32": _on_reals(np.maximum),
    "neg.f32": _on_reals(np.negative),
    "ex2.approx.ftz.f32": _on_reals(np.exp2),
    "tanh.approx.f32": _on_reals(np.tanh),
    "rsqrt.approx.ftz.f32": _on_reals(lambda a: 1 / np.sqrt(a)),
    "cvt.rn.bf16x2.f32": _pair_of_reals,
    "cvt.rn.satfinite.e4m3x2.f32": _pair_of_e4m3,
    "dp2a.lo.u32.u32": _on_words(_half_times),
    "max.NaN.xorsign.abs.bf16x2": _by_halves(_larger_magnitude),
    "fma.rn.bf16x2": _on_halves(ml_dtypes.bfloat16, lambda a, b, c: a * b + c),
    "fma.rn.sat.f16x2": _on_halves(
        np.float16, lambda a, b, c: np.nan_to_num(np.clip(a * b + c, 0, 1))
    ),
    "add.rn.f16x2": _on_halves(np.float16, np.add),
    "max.NaN.f16x2": _on_halves(np.float16, np.maximum),
    "cvt.u16.u32": lambda a: a & np.uint64(0xFFFF),
    "cvt.u32.u16": lambda a: a & np.uint64(0xFFFF),
    "cvt.f32.f16": lambda a: _half(a).astype(np.float32).view(np.uint32).astype(np.uint64),
    "cvt.rn.f16.f32": lambda a: _to_half(a, down=False),
    "cvt.rm.f16.f32": lambda a: _to_half(a, down=True),
}
