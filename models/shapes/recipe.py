"""A recipe for the shapes model: which formats its weights and activations get."""

import dataclasses
from collections.abc import Callable
from typing import Any

from models.common.layers import Ops
from models.common.quantizer import InputQuantizer, SiteRule
from models.shapes.generate import PLAIN_OPS, Settings
from sdq import LeafReport, Rule, formats, progress_bar, quantize_params, resolve
from sdq.rules import Plan

KEEP = "bf16"  # the name of "not quantised"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Formats of the blocks' kernels and of the inputs of the blocks' linears; or "bf16"."""

    weights: str = KEEP
    acts: str = KEEP

    def __post_init__(self):
        for name in (self.weights, self.acts):
            if name != KEEP:
                formats.parse(name)

    def __str__(self) -> str:
        return f"weights {self.weights}, activations {self.acts}"


def plan(params: Any, recipe: Recipe) -> Plan:
    """What happens to each weight."""
    blocks = [] if recipe.weights == KEEP else [Rule(r"dit/blocks/.*/kernel", recipe.weights)]
    return resolve([*blocks, Rule(r".*", None)], params)


def apply(
    params: Any,
    recipe: Recipe,
    settings: Settings,
    on_leaf: Callable[[LeafReport], None] | None = None,
) -> tuple[Any, Settings]:
    """Quantised weights, and settings whose ops quantise activations; with a progress bar."""
    decided = plan(params, recipe)
    with progress_bar(decided, on_leaf) as advance:
        quantised = quantize_params(params, decided, on_leaf=advance)
    ops = PLAIN_OPS
    if recipe.acts != KEEP:
        ops = Ops(quantizer=InputQuantizer((SiteRule(r"blocks/.*", recipe.acts),)))
    return quantised, dataclasses.replace(settings, ops=ops)
