"""One file for each family of number formats: blocks of float32 to codes and scales, and back.

Every codec module offers
  encode(x, fmt, choice) -> Encoded               x float32 [..., G, block]; only dialects choose
  decode(encoded, fmt) -> float32 [..., G, block]
  problems(encoded, fmt) -> {words: bool scalar}  what the format can never produce
"""

from types import ModuleType

from sdq.codecs import dialect, integer, mxfp4, nf4, nvfp4
from sdq.codecs.encoded import Encoded as Encoded
from sdq.formats import Format

_FAMILIES: dict[str, ModuleType] = {
    "dialect": dialect,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "integer": integer,
    "nf4": nf4,
}


def codec(fmt: Format) -> ModuleType:
    """The module that encodes and decodes a format."""
    return _FAMILIES[fmt.family]
