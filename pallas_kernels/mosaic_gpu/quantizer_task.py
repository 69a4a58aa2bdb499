"""What a quantiser's program is written for: the shapes, the format and how the work is cut."""

import dataclasses

from pallas_kernels.mosaic_gpu import quantizer_tables as tables
from sdq import formatbook
from sdq.formatbook import Book
from sdq.formats import Format

WARP = 32
DIALECTS = 256
DIALECT_BYTES = 8
ARRIVAL_BYTES = 8
ALIGNED = 128  # bytes; bulk copies and wide loads ask for 16, but rows come 3 % to 5 % slower then
MEETING = 2  # numbers that the warps of a row tell each other at once, at most
# Threads of a row: the words of x that each may hold before more threads share the row.
WORDS_HELD = {32: 32, 64: 32, 128: 56, 256: 56, 512: 56}
WORDS_WITH_NORM = 32  # whose gains and shifts want registers too


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the work is cut.

    Attributes:
      threads: of a row, whole warps.
      warps: of a thread block, a multiple of 4, for one or more rows.
      columns: copies of the table; 16 leave no bank conflict.
      exchange: with blocks of 16, whether neighbours swap words to store 16 bytes at once, else
        each stores twice 8.
    """

    threads: int = 128
    warps: int = 16
    columns: int = 16
    exchange: bool = True

    def __post_init__(self):
        """Refuse what no program can be written for."""
        together = self.warps * WARP
        if self.warps % 4 or not 0 < self.warps <= 32:
            raise ValueError(f"warps: expected a multiple of 4 up to 32, got {self.warps}")
        if self.threads <= 0 or self.threads % WARP or together % self.threads:
            raise ValueError(
                f"threads: expected whole warps that divide {together}, got {self.threads}"
            )
        if self.threads > WARP and together // self.threads > 15:
            raise ValueError(f"threads: at most 15 rows have a barrier each, got {self}")
        if self.columns not in (1, 2, 4, 8, 16):
            raise ValueError(f"columns: expected a power of two up to 16, got {self.columns}")


# Of 5120 channels: with two blocks each, no thread waits for one that has more.
EVEN_LENGTH, EVEN_BLOCK = 5120, 16
EVEN = Config(threads=160, warps=20)


def default_config(length: int, block: int, *, norm: bool = False) -> Config:
    """The fewest threads a row that leave each few enough words; measured on an H200."""
    if (length, block) == (EVEN_LENGTH, EVEN_BLOCK):
        return EVEN
    for threads, most in WORDS_HELD.items():
        if words_held(length, block, threads) <= (min(most, WORDS_WITH_NORM) if norm else most):
            return Config(threads=threads)
    return Config(threads=max(WORDS_HELD))


def words_held(length: int, block: int, threads: int) -> int:
    """Registers for x of a thread, two numbers each."""
    return -(-length // (block * threads)) * block // 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All that the text depends on.

    Attributes:
      rows: M.
      length: K, a multiple of 32.
      format: a dialect format with blocks of 16 or 32.
      config: how.
      metadata: whether the blocks' bytes are written.
      books: sub-formatbooks of a group: none, 1, or one for each block.
      residuals: rows that follow the M: what quantising left over of some of them.
      eps: of the layer norm in front; None for none.
      batch: how many rows of gains and shifts that has, each for M / batch rows.
      activation: in front, one of `quantizer_activation.PROGRAMS`, or None.
      more: how many of a row's channels, the last ones, lie in an array of their own.
    """

    rows: int
    length: int
    format: Format
    config: Config
    metadata: bool
    books: int = 0
    residuals: int = 0
    eps: float | None = None
    batch: int = 1
    activation: str | None = None
    more: int = 0

    @property
    def block(self) -> int:
        """Channels of a block."""
        assert self.format.block is not None
        return self.format.block

    @property
    def blocks(self) -> int:
        """Of a row."""
        return self.length // self.block

    @property
    def slots(self) -> int:
        """Blocks of a thread, the last of which may not exist."""
        return -(-self.blocks // self.config.threads)

    @property
    def book(self) -> Book:
        """The dialects."""
        return formatbook.BOOKS[self.format.book or ""]

    @property
    def rows_at_once(self) -> int:
        """Of a thread block."""
        return self.config.warps * WARP // self.config.threads

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of what the text calls $0, $1, ...: 64-bit addresses, and shared memory's."""
        optional = {
            "more": self.more,
            "books": self.books,
            "group": self.books,
            "tokens": self.residuals,
            "modulation": self.eps is not None,
            "values": True,
            "exponents": True,
            "residual_values": self.residuals,
            "residual_exponents": self.residuals,
            "metadata": self.metadata,
        }
        present = [name for name, is_there in optional.items() if is_there]
        return ("x", "table", "dialects", *present, "shared")

    def argument(self, name: str) -> str:
        """One of them."""
        return f"${self.arguments.index(name)}"

    @property
    def table_pairs(self) -> int:
        """Entries of the table, copies counted."""
        return len(self.book.tops) * tables.ENTRIES * self.config.columns

    @property
    def dialects_at(self) -> int:
        """Where shared memory holds the dialects, in bytes."""
        return self.table_pairs * tables.ENTRY_BYTES

    @property
    def warps_at(self) -> int:
        """Where shared memory holds what warps tell each other, twice: by turns."""
        return _aligned(self.dialects_at + DIALECTS * DIALECT_BYTES)

    @property
    def places(self) -> int:
        """For a number of each of a row's warps, which are read four at once."""
        warps = self.config.threads // WARP
        return warps if warps <= 2 else -(-warps // 4) * 4

    @property
    def rows_at(self) -> int:
        """Where shared memory holds the rows that are worked on next."""
        return _aligned(self.warps_at + 2 * MEETING * 4 * self.places * self.rows_at_once)

    @property
    def row_bytes(self) -> int:
        """Of x."""
        return 2 * self.length

    @property
    def arrivals_at(self) -> int:
        """Where shared memory holds a barrier for each of these rows."""
        return self.rows_at + self.row_bytes * self.rows_at_once

    @property
    def shared_bytes(self) -> int:
        """Of shared memory."""
        return self.arrivals_at + ARRIVAL_BYTES * self.rows_at_once


def _aligned(size: int) -> int:
    """The next multiple of ALIGNED."""
    return -(-size // ALIGNED) * ALIGNED
