"""How the Hopper matmuls cut their work."""

import dataclasses
import math
from typing import TypeVar

from pallas_kernels.device import HOPPER_SMS

ROWS = 64  # that a warpgroup multiplies: of the weight, or queries
TILE_K = 128  # channels of a tile: a slot of many rows
THREADS = 128  # of a warpgroup
SMALL_THINGS = 6144  # table and barriers
FEW = 64  # rows of x with which a product only reads weights
DEEP = 2  # tiles of channels in a slot of few rows
SHARED_MEMORY = 232448  # bytes of a Hopper block
REGISTERS = 65536  # of an SM
PRODUCER_REGISTERS = 24  # of a thread that only copies
TURN = 80  # rows: a tile takes as long as if it had so many more, measured on an H100
ALONE = 1.02  # times longer takes a block that shares no rows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One way to cut it for many rows of x.

    Attributes:
      tile_m: rows of x, a multiple of 8 up to 256, of 16 if blocks share them.
      warpgroups: that multiply.
      stages: slots of the ring.
      cluster: blocks that share each tile of x, 1 or 2.
      promote: tiles of K (of 128 channels) that the tensor cores sum up before float32 registers
        take over; 0 is all. Their own sums of fp8 products keep 14 bits.
      width: tiles along M before the next tile along N, for reuse in L2; a power of two.
      x_bytes: of a number of x: 1, fp8, or 2, bf16.
    """

    tile_m: int = 256
    warpgroups: int = 2
    stages: int = 4
    cluster: int = 1
    promote: int = 0
    width: int = 8
    x_bytes: int = 1

    def __post_init__(self):
        if self.width < 1 or self.width & (self.width - 1):
            raise ValueError(f"width: expected a power of two, got {self.width}")
        for name, least, most in (
            ("warpgroups", 1, 3),
            ("stages", 2, 16),
            ("cluster", 1, 2),
            ("x_bytes", 1, 2),
        ):
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name}: expected in [{least}, {most}], got {value}")
        if not 0 < self.tile_m <= 256 or self.tile_m % (eight := 8 * self.cluster):
            raise ValueError(f"tile_m: expected a multiple of {eight} up to 256, got {self.tile_m}")

    @property
    def tile_n(self) -> int:
        """Weight rows of a block."""
        return ROWS * self.warpgroups

    @property
    def piece(self) -> int:
        """Rows of the result that leave together; of the last ones of a tile, fewer may be left."""
        return min(64, self.tile_m)

    @property
    def pieces(self) -> int:
        """Of a tile."""
        return math.ceil(self.tile_m / self.piece)

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """Where each piece of a tile begins, and its rows."""
        starts = range(0, self.tile_m, self.piece)
        return [(at, min(self.piece, self.tile_m - at)) for at in starts]

    def shared_memory(self, out_bytes: int) -> int:
        """Bytes that a block needs at least; blocks of 16, results of `out_bytes` a number."""
        slot = self.tile_m * TILE_K * self.x_bytes + self.tile_n * (TILE_K // 2 + 8)
        scales = self.warpgroups * (self.tile_m + 32 + 3 * ROWS) * 4
        return self.stages * slot + scales + SMALL_THINGS + 2 * self._pieces_bytes(out_bytes)

    def pieces_at_once(self, out_bytes: int) -> int:
        """Pieces of a result that fit into shared memory on their way out: as many as it has."""
        left = SHARED_MEMORY - self.shared_memory(out_bytes)
        room = 2 + left // self._pieces_bytes(out_bytes)
        return max(2, min(room, self.pieces))

    def _pieces_bytes(self, out_bytes: int) -> int:
        """Of a piece of every warpgroup."""
        return self.warpgroups * self.piece * ROWS * out_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FewConfig:
    """One way to cut it for rows so few that reading the weight takes longest.

    Attributes:
      rows: of x, all of them; a multiple of 8 up to FEW.
      warpgroups: that share the channels of 64 weight rows.
      stages: slots of the ring, DEEP tiles of channels each, for one warpgroup: a multiple of them.
      x_bytes: of a number of x: 1, fp8, or 2, bf16.
    """

    rows: int = 64
    warpgroups: int = 2
    stages: int = 8
    x_bytes: int = 1

    def __post_init__(self):
        if not 0 < self.rows <= FEW or self.rows % 8:
            raise ValueError(f"rows: expected a multiple of 8 up to {FEW}, got {self.rows}")
        if not 1 <= self.warpgroups <= 6:
            raise ValueError(f"warpgroups: expected in [1, 6], got {self.warpgroups}")
        if not 2 <= self.stages <= 32 or self.stages % self.warpgroups:
            raise ValueError(
                f"stages: expected a multiple of {self.warpgroups} in [2, 32], got {self.stages}"
            )
        if not 1 <= self.x_bytes <= 2:
            raise ValueError(f"x_bytes: expected 1 or 2, got {self.x_bytes}")

    def shared_memory(self, out_bytes: int) -> int:
        """Bytes that a block needs; blocks of 16, results of `out_bytes` a number."""
        slot = DEEP * (self.rows * TILE_K * self.x_bytes + ROWS * (TILE_K // 2 + 8))
        sums = (4 * max(1, self.warpgroups - 1) + out_bytes) * ROWS * self.rows
        return self.stages * slot + sums + SMALL_THINGS


AnyConfig = TypeVar("AnyConfig", Config, FewConfig)

MODES = {  # of fp8 rows; the largest tile of each, whose sums fill the registers
    "fast": Config(),
    "accurate": Config(tile_m=192, promote=2),
}
BF16 = "bf16"  # stands where a mode does: of bf16 rows, whose sums are float32 anyway
BASES = {**MODES, BF16: Config(tile_m=192, x_bytes=2)}


def heuristic(
    mode: str, m: int, n: int, out_bytes: int = 2, cores: int = HOPPER_SMS
) -> Config | FewConfig:
    """For m rows of x and n of w that nobody has tuned; a mode of MODES, or BF16."""
    if m <= FEW:
        return fitted(FewConfig(rows=rows_of_few(m), x_bytes=BASES[mode].x_bytes), out_bytes)
    return fitted(tiles(mode, m, n, cores)[0], out_bytes)


def tiles(mode: str, m: int, n: int, cores: int) -> list[Config]:
    """Ways to cut many rows, best first: large tiles, and few blocks idle in the last turn."""
    base = BASES[mode]
    of_n = math.ceil(n / base.tile_n)
    found = (
        dataclasses.replace(base, tile_m=rows, cluster=cluster)
        for cluster in (2, 1)
        if of_n % cluster == 0  # all blocks have a partner
        for rows in range(base.tile_m, FEW - 1, -8 * cluster)
    )

    def duration(config: Config) -> float:
        """Of all turns, in rows."""
        at_once = cores // config.cluster * config.cluster
        turns = math.ceil(math.ceil(m / config.tile_m) * of_n / at_once)
        return turns * (config.tile_m + TURN) * (ALONE if config.cluster == 1 else 1)

    return sorted(found, key=duration)


def rows_of_few(m: int) -> int:
    """`FewConfig.rows` for m rows."""
    return -(-m // 8) * 8


def consumer_registers(warpgroups: int) -> int:
    """Of a thread of warpgroups that multiply: what the copying one leaves of those at the start.

    Asking for one more would wait for ever.
    """
    at_start = REGISTERS // (THREADS * (warpgroups + 1)) // 8 * 8
    left = at_start * (warpgroups + 1) - PRODUCER_REGISTERS
    return min(256, left // warpgroups // 8 * 8)


def fitted(config: AnyConfig, out_bytes: int, most: int = 6) -> AnyConfig:
    """With as many slots as there is room for; for few rows, no more than it has."""
    step = 1
    if isinstance(config, FewConfig):
        step, most = config.warpgroups, config.stages
    tried = (dataclasses.replace(config, stages=stages) for stages in range(most, 1, -step))
    return next(one for one in tried if one.shared_memory(out_bytes) <= SHARED_MEMORY)
