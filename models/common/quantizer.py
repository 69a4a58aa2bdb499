"""What a model does to the inputs of its linears: the interface, and the kinds without a memory.

A model calls its quantizer at every site where linears read an input ("blocks/self_attn/qkv",
"head"). A quantizer that learns from what it sees keeps that in a state, a pytree that the model
threads through its blocks and the sampler through its steps; the others know only None.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax

from sdq import QTensor, fake_quantize, formats
from sdq.decompose import Decomposed
from sdq.rotate import hadamard, largest_group
from sdq.rules import check_pattern

Input = jax.Array | QTensor | Decomposed


class Quantizer(Protocol):
    """Pure functions; hashable and compared by value, so that `jit` compiles a recipe once."""

    def initial_state(self, blocks: int, batch: int) -> Any:
        """The state before the first step, stacked over the blocks; None for no memory."""
        ...

    def at_step(self, state: Any, step: jax.Array) -> Any:
        """The state with which step number `step` of sampling begins."""
        ...

    def quantize(self, x: jax.Array, site: str, state: Any) -> Input:
        """x `[..., K]` as its linears will read it; called once for each input."""
        ...

    def saw_input(self, x: jax.Array, site: str, state: Any) -> Any:
        """The state after seeing an input (as it was, not as it became)."""
        ...

    def saw_attention(self, q: jax.Array, k: jax.Array, site: str, state: Any) -> Any:
        """The state after seeing the queries and keys `[B, S, heads, width]` of an attention."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Keep:
    """Leaves every input as it is, and remembers nothing."""

    def initial_state(self, blocks: int, batch: int) -> None:
        """None."""
        del blocks, batch

    def at_step(self, state: Any, step: jax.Array) -> Any:
        """The same state."""
        del step
        return state

    def quantize(self, x: jax.Array, site: str, state: Any) -> Input:
        """x."""
        del site, state
        return x

    def saw_input(self, x: jax.Array, site: str, state: Any) -> Any:
        """The same state."""
        del x, site
        return state

    def saw_attention(self, q: jax.Array, k: jax.Array, site: str, state: Any) -> Any:
        """The same state."""
        del q, k, site
        return state


KEEP = Keep()


@dataclasses.dataclass(frozen=True, slots=True)
class SiteRule:
    """What happens to the inputs of linears at sites whose whole name matches.

    Attributes:
      pattern: regular expression for the full site name ("blocks/ffn/up").
      format: a format name, or None to keep the input as it is.
      select: how blocks choose their dialect; None is "two_stage" where there is a choice.
      rotate: rotate the input first (`sdq.rotate`); the kernels that read it must be rotated too
        (`kernels.rotate`).
    """

    pattern: str
    format: str | None
    select: str | None = None
    rotate: bool = False

    def __post_init__(self):
        check_pattern(self.pattern)
        if self.format is not None:
            formats.parse(self.format)

    @property
    def rule(self) -> str | None:
        """The `select` of `sdq.quantize`."""
        if self.select or self.format is None or not formats.parse(self.format).has_choice:
            return self.select
        return "two_stage"

    def turned(self, x: jax.Array) -> jax.Array:
        """x `[..., K]` as it is quantised: rotated or as it is."""
        return hadamard(x, largest_group(x.shape[-1])) if self.rotate else x

    def rounded(self, x: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
        """A turned x as the numbers that it becomes; `allowed` as for `sdq.quantize`."""
        if self.format is None:
            return x
        return fake_quantize(x, self.format, select=self.rule, allowed=allowed)


@dataclasses.dataclass(frozen=True, slots=True)
class InputQuantizer(Keep):
    """Rounds inputs: the first rule that matches wins, a site without rule is kept.

    Values are quantised along the last axis and returned as the numbers that they became.
    """

    rules: tuple[SiteRule, ...]

    def quantize(self, x: jax.Array, site: str, state: Any) -> Input:
        """x `[..., K]`, rounded to the format of its site."""
        del state
        rule = first_match(self.rules, site)
        return x if rule is None else rule.rounded(rule.turned(x))


def first_match(rules: Sequence[SiteRule], site: str) -> SiteRule | None:
    """The rule that decides about a site."""
    return next((rule for rule in rules if re.fullmatch(rule.pattern, site)), None)


def misfits(rules: Sequence[SiteRule], sites: Iterable[str]) -> list[str]:
    """A sentence for each rule that decides about none of a model's sites."""
    sites = list(sites)
    used = {first_match(rules, site) for site in sites}
    return [
        f"input rule {number} {rule.pattern!r} decides about none of {', '.join(sites)}"
        for number, rule in enumerate(rules)
        if rule not in used
    ]
