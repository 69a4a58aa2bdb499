"""Ops that quantise the inputs of linears, from rules over the sites where a model asks."""

import dataclasses
import re
from collections.abc import Sequence

import jax

from models.common.layers import Ops
from sdq import fake_quantize, formats
from sdq.rules import check_pattern


@dataclasses.dataclass(frozen=True, slots=True)
class SiteRule:
    """What happens to the inputs of linears at sites whose whole name matches.

    Attributes:
      pattern: regular expression for the full site name ("blocks/ffn/up").
      format: a format name, or None to keep the input as it is.
      select: how blocks choose their dialect; None is "two_stage" where there is a choice.
    """

    pattern: str
    format: str | None
    select: str | None = None

    def __post_init__(self):
        check_pattern(self.pattern)
        if self.format is not None:
            formats.parse(self.format)


@dataclasses.dataclass(frozen=True, slots=True)
class InputQuantizer:
    """An `Ops.quantize_input`: the first rule that matches wins, a site without rule is kept.

    Values are quantised along the last axis and returned as the numbers that they became. Compares
    by value, so that `jit` compiles a recipe once.
    """

    rules: tuple[SiteRule, ...]

    def __call__(self, x: jax.Array, site: str) -> jax.Array:
        """x `[..., K]`, rounded to the format of its site."""
        for rule in self.rules:
            if re.fullmatch(rule.pattern, site):
                if rule.format is None:
                    return x
                fmt = formats.parse(rule.format)
                select = rule.select or ("two_stage" if fmt.has_choice else None)
                return fake_quantize(x, rule.format, axis=-1, select=select)
        return x


def quantized_ops(rules: Sequence[SiteRule], ops: Ops | None = None) -> Ops:
    """The same Ops, with inputs quantised by the rules."""
    return dataclasses.replace(ops or Ops(), quantize_input=InputQuantizer(tuple(rules)))
