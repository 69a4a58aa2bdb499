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

from pallas_kernels import Deferred, Fp8Rows, Projected, computed
from sdq import QTensor, fake_quantize, formats, seda
from sdq.decompose import Decomposed, residual
from sdq.rotate import hadamard, largest_group
from sdq.rules import check_pattern

Input = jax.Array | QTensor | Fp8Rows | Decomposed


class Quantizer(Protocol):
    """Pure functions; hashable and compared by value, so that `jit` compiles a recipe once."""

    def initial_state(self, blocks: int, batch: int) -> Any:
        """The state before the first step, stacked over the blocks; None for no memory."""
        ...

    def at_step(self, state: Any, step: jax.Array) -> Any:
        """The state with which step number `step` of sampling begins."""
        ...

    def quantize(self, x: jax.Array | Deferred, site: str, state: Any) -> Input:
        """x `[..., K]` as its linears will read it; called once for each input."""
        ...

    def saw_input(self, x: jax.Array | Deferred, site: str, state: Any) -> Any:
        """The state after seeing an input (as it was, not as it became)."""
        ...

    def saw_attention(
        self, q: jax.Array | Projected, k: jax.Array | Projected, site: str, state: Any
    ) -> Any:
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

    def quantize(self, x: jax.Array | Deferred, site: str, state: Any) -> Input:
        """x."""
        del site, state
        return computed(x)

    def saw_input(self, x: jax.Array | Deferred, site: str, state: Any) -> Any:
        """The same state."""
        del x, site
        return state

    def saw_attention(
        self, q: jax.Array | Projected, k: jax.Array | Projected, site: str, state: Any
    ) -> Any:
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

    def turned(self, x: jax.Array | Deferred) -> jax.Array | Deferred:
        """x `[..., K]` as it is quantised: rotated or as it is."""
        return hadamard(computed(x), largest_group(x.shape[-1])) if self.rotate else x

    def rounded(self, x: jax.Array | Deferred, allowed: jax.Array | None = None) -> jax.Array:
        """A turned x as the numbers that it becomes; `allowed` as for `sdq.quantize`."""
        x = computed(x)
        if self.format is None:
            return x
        return fake_quantize(x, self.format, select=self.rule, allowed=allowed)


class Rounding(Protocol):
    """How inputs are rounded: in plain jnp, or by a kernel. Compared by value, like a function."""

    def __call__(
        self,
        x: jax.Array | Deferred,
        rule: SiteRule,
        sub_formatbooks: tuple[jax.Array, jax.Array] | None = None,
        tokens: jax.Array | None = None,
    ) -> tuple[Input, Input | None]:
        """Round a turned x, and what is left over of some tokens.

        Args:
          x: `[..., K]`; `[B, S, K]` with sub-formatbooks or tokens.
          rule: with a format.
          sub_formatbooks: of `seda.sub_formatbooks`, and the group of each token.
          tokens: of which the residual is wanted, int32 `[B, n]`.
        Returns:
          Q(x), and Q(x - Q(x)) of the tokens or None, as the model's matmul reads them.
        """
        ...


def plain_rounding(
    x: jax.Array | Deferred,
    rule: SiteRule,
    sub_formatbooks: tuple[jax.Array, jax.Array] | None = None,
    tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """A Rounding in jnp: everything as the numbers that it becomes."""
    base = rule.rounded(x, None if sub_formatbooks is None else seda.allowed(*sub_formatbooks))
    if tokens is None:
        return base, None
    assert rule.format is not None
    return base, residual(computed(x), base, tokens, rule.format, rule.rule)


@dataclasses.dataclass(frozen=True, slots=True)
class InputQuantizer(Keep):
    """Rounds inputs along their last axis.

    Attributes:
      rules: the first that matches wins, a site without rule is kept.
      rounding: how.
    """

    rules: tuple[SiteRule, ...]
    rounding: Rounding = plain_rounding

    def quantize(self, x: jax.Array | Deferred, site: str, state: Any) -> Input:
        """x `[..., K]`, rounded to the format of its site."""
        del state
        rule = first_match(self.rules, site)
        if rule is None or rule.format is None:
            return computed(x if rule is None else rule.turned(x))
        return self.rounding(rule.turned(x), rule)[0]


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
