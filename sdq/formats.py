"""Format: one frozen row that says everything static about a 4-bit (or 8-bit) number format.

Words used in the whole project:
  block   elements that share one scale, consecutive along the contraction axis
  tile    what a kernel loads at a time (never the same thing as a block)
  row     all blocks of one token or of one output channel
  codes   the element numbers as stored; scales: what each block stores; outer: what scales share

Shape letters: M rows, K contraction, N outputs, G = K / block; B batch, T frames, H W latent grid,
S tokens, D width. Scales are always multiplied to dequantise.

How the numbers are computed is not here: one family, one file, in `sdq/codecs`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from sdq.formatbook import BOOKS

Family = Literal["dialect", "mxfp4", "nvfp4", "integer", "nf4"]

DIALECT_BLOCKS = (8, 16, 32, 64, 128)
MX_SCALE_RULES = ("floor", "rceil", "even")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """What a format name means. Hashable, compares by value, safe as a static jit argument.

    `parse(f.name) == f` holds for every Format.
    """

    name: str
    family: Family
    element_bits: int
    block: int | None  # None: the whole row is one block
    scale_bits: int  # stored for every block
    outer: Literal["row", "matrix"] | None = None  # who shares the second-level scale
    book: str | None = None  # family "dialect": a key of formatbook.BOOKS
    scale_rule: str | None = None  # family "mxfp4": one of MX_SCALE_RULES

    @property
    def bits_per_element(self) -> float:
        """Bits stored for an element, block scales included, outer scales not."""
        per_block = self.scale_bits / self.block if self.block else 0.0
        return self.element_bits + per_block

    @property
    def outer_bits(self) -> int:
        """Bits of one second-level scale (one for each row, or for each matrix)."""
        return {"row": 8, "matrix": 32, None: 0}[self.outer]

    @property
    def has_choice(self) -> bool:
        """True where a block chooses among dialects, so that `select` means something."""
        return self.family == "dialect" and len(BOOKS[self.book or ""].ids) > 1

    def __str__(self) -> str:
        return self.name


def parse(name: str | Format) -> Format:
    """The Format that a name like "sdq32:16" stands for; a Format passes through.

    Raises:
      ValueError: unknown name or option; the message lists what is possible.

    >>> parse("sdq32:16").bits_per_element
    4.5
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise ValueError(f"format: expected a name like 'sdq32:16' or a Format, got {name!r}")
    return _parse(name)


@functools.cache
def _parse(name: str) -> Format:
    head, colon, option = name.partition(":")
    if colon and not option:
        raise ValueError(f"format {name!r}: nothing follows the colon")
    if head not in _PARSERS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(SYNTAX)}")
    return _PARSERS[head](name, option)


def _dialect(name: str, option: str) -> Format:
    book = name.partition(":")[0]
    block = _block(name, option, required=True)
    if block not in DIALECT_BLOCKS:
        raise ValueError(f"format {name!r}: block must be one of {DIALECT_BLOCKS}")
    return Format(
        name=name,
        family="dialect",
        element_bits=4,
        block=block,
        scale_bits=8,
        outer="row",
        book=book,
    )


def _mxfp4(name: str, option: str) -> Format:
    rule = option or "floor"
    if rule not in MX_SCALE_RULES:
        raise ValueError(f"format {name!r}: scale rule must be one of {MX_SCALE_RULES}")
    canonical = "mxfp4" if rule == "floor" else f"mxfp4:{rule}"
    return Format(
        name=canonical,
        family="mxfp4",
        element_bits=4,
        block=32,
        scale_bits=8,
        scale_rule=rule,
    )


def _nvfp4(name: str, option: str) -> Format:
    if option not in ("", "one_level"):
        raise ValueError(f"format {name!r}: the only option is 'one_level'")
    return Format(
        name=name,
        family="nvfp4",
        element_bits=4,
        block=16,
        scale_bits=8,
        outer=None if option else "matrix",
    )


def _integer(name: str, option: str) -> Format:
    return Format(
        name=name,
        family="integer",
        element_bits=int(name.partition(":")[0].removeprefix("int")),
        block=_block(name, option, required=False),
        scale_bits=16,
    )


def _nf4(name: str, option: str) -> Format:
    return Format(
        name=name,
        family="nf4",
        element_bits=4,
        block=_block(name, option, required=True),
        scale_bits=16,
    )


def _block(name: str, option: str, *, required: bool) -> int | None:
    if not option and not required:
        return None
    # One spelling for one format, so that names compare as formats do: no "+16", no "016".
    if option and option.isascii() and option.isdigit() and str(int(option)) == option:
        block = int(option)
        if block >= 2 and block % 2 == 0:
            return block
    raise ValueError(
        f"format {name!r}: expected an even block size after a colon, "
        f"like '{name.partition(':')[0]}:32'"
    )


_PARSERS: dict[str, Callable[[str, str], Format]] = {
    **dict.fromkeys(BOOKS, _dialect),
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "int4": _integer,
    "int8": _integer,
    "nf4": _nf4,
}

SYNTAX = (
    *(f"{book}:<block>" for book in BOOKS),
    f"mxfp4[:{'|'.join(MX_SCALE_RULES)}]",
    "nvfp4[:one_level]",
    "int4[:<block>]",
    "int8[:<block>]",
    "nf4:<block>",
)
