"""How a model is quantised, as data: a Recipe, and the ones that have a name.

Recipes compose. Rules are tried in order, so one's own go in front:

    recipe = RECIPES["semanticdialect"]
    mine = dataclasses.replace(
        recipe, name="mine", inputs=(SiteRule("blocks/ffn/down", "int8"), *recipe.inputs)
    )

Nothing here knows a model; what carries a recipe out does (`models/shapes/recipe.py`).
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

import rich.table

from models.common.full_path import FullPath
from models.common.quantizer import InputQuantizer, Quantizer, SiteRule, misfits
from models.common.scan import SHARES
from models.common.semantic import SALIENCY, Decomposition, Layers, SemanticDialect, Sharing
from sdq import Rule, resolve
from sdq.rules import Plan

KEEP = "bf16"  # the name of "not quantised"
KERNELS = r"(.*/)?(\w+_)?blocks/.*/kernel"
INPUTS = r"(\w+_)?blocks/(?!modulation).*"  # modulation reads one vector a video
ENDS = r"(.*/)?(patch_embedding|img_in|cond_in|head)/kernel"  # read pixels, or make them


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What happens to a model's weights and to the inputs of its linears.

    Attributes:
      name: by which results are listed.
      summary: what it is, in a line.
      weights: for the parameters; what no rule matches is kept.
      inputs: for the inputs of the linears; a site without a rule is kept.
      feedback: choose the weights' codes for the error of the product (`sdq.feedback`).
      smooth: how much of the inputs' range moves into the weights, in [0, 1] (SmoothQuant's
        alpha); None moves nothing.
      sharing: SeDA, or None.
      extra_work: what activation decomposition may add to the matrix products of the blocks, as a
        share of them; the data-free scan decides where. 0 is no decomposition.
      salient: which share of the tokens is decomposed, one of `scan.SHARES`; None: what pays most.
      saliency: by which tokens are salient, one of `semantic.SALIENCY`.
      refresh_every: steps between two looks at the attention; 0 looks at the first alone.
      attention: how its operands are rounded, or None for not at all.
    """

    name: str
    summary: str = ""
    weights: tuple[Rule, ...] = ()
    inputs: tuple[SiteRule, ...] = ()
    feedback: bool = False
    smooth: float | None = None
    sharing: Sharing | None = None
    extra_work: float = 0.0
    salient: float | None = None
    saliency: str = SALIENCY[0]
    refresh_every: int = 6
    attention: FullPath | None = None

    def __post_init__(self):
        if not self.extra_work >= 0:
            raise ValueError(f"extra_work: expected a share from 0 up, got {self.extra_work}")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth: expected a share in [0, 1], got {self.smooth}")
        if self.salient is not None and self.salient not in SHARES:
            raise ValueError(
                f"salient: expected one of {', '.join(map(str, SHARES))}, got {self.salient}"
            )

    def __str__(self) -> str:
        return self.name

    @property
    def weight_formats(self) -> str:
        """In words, for tables."""
        return _words(rule.format for rule in self.weights)

    @property
    def input_formats(self) -> str:
        """In words, for tables."""
        return _words(rule.format for rule in self.inputs)

    @property
    def is_online(self) -> bool:
        """Whether something is learned while sampling."""
        return self.sharing is not None or self.extra_work > 0

    @property
    def needs_scan(self) -> bool:
        """Whether the model's own samples are needed to prepare it."""
        return self.feedback or self.smooth is not None or self.needs_noise

    @property
    def needs_noise(self) -> bool:
        """Whether a plan depends on where the noise comes from."""
        quietest = self.sharing is not None and self.sharing.noise < 1
        return self.extra_work > 0 or quietest


def rounding(
    weights: str = KEEP,
    acts: str = KEEP,
    *,
    name: str | None = None,
    select: str | None = None,
    **parts: Any,
) -> Recipe:
    """One format for all kernels of the blocks and one for all their inputs.

    Args:
      weights: a format's name, or KEEP.
      acts: likewise.
      name: of the recipe (default: says the formats).
      select: how blocks choose their dialect, of kernels and inputs.
      parts: further fields of the Recipe.
    """
    return Recipe(
        name=name or f"weights {weights}, activations {acts}",
        weights=() if weights == KEEP else (Rule(KERNELS, weights, select=select),),
        inputs=() if acts == KEEP else (SiteRule(INPUTS, acts, select),),
        **parts,
    )


def named(name: str) -> Recipe:
    """The recipe of that name; raises ValueError with what there is."""
    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"unknown recipe {name!r}; there is {', '.join(RECIPES)}{hint}")


def with_embedders(recipe: Recipe, fmt: str) -> Recipe:
    """Also what embeds time and text, outside of the blocks, in a format, or KEEP."""
    if fmt == KEEP:
        return recipe
    return dataclasses.replace(
        recipe, weights=(*recipe.weights, Rule(ENDS, None), Rule(r".*/kernel", fmt))
    )


def plan(params: Any, recipe: Recipe, sites: Iterable[str]) -> Plan:
    """What happens to each weight.

    Args:
      params: the tree of arrays, or its shapes.
      recipe: whose rules must all decide something.
      sites: of the model's inputs.
    Raises:
      ValueError: one message that lists every rule that matches nothing in this model, every leaf
        that cannot take its format.
    """
    problems, decided = misfits(recipe.inputs, sites), None
    try:
        decided = resolve([*recipe.weights, Rule(r".*", None)], params)
    except ValueError as error:
        problems.insert(0, str(error))
    if decided is None or problems:
        raise ValueError(f"recipe {recipe.name!r} does not fit this model: " + "; ".join(problems))
    return decided


def quantizer(
    recipe: Recipe,
    *,
    grid: tuple[int, int, int],
    sites: tuple[tuple[str, int], ...],
    decomposition: Decomposition | None = None,
    sharing_layers: Layers | None = None,
) -> Quantizer:
    """What the model does to the inputs of its linears.

    Args:
      recipe: the recipe.
      grid: tokens of a video along (T, H, W).
      sites: those whose inputs are the video's tokens, with the inputs' width.
      decomposition: what the scan proposed within `recipe.extra_work`.
      sharing_layers: those that the scan found quiet enough for `recipe.sharing`; None is all.
    """
    if not recipe.is_online:
        return InputQuantizer(recipe.inputs)
    return SemanticDialect(
        rules=recipe.inputs,
        grid=grid,
        sites=sites,
        sharing=recipe.sharing,
        sharing_layers=sharing_layers,
        decomposition=decomposition,
        saliency=recipe.saliency,
        refresh_every=recipe.refresh_every,
    )


def to_rich(chosen: Iterable[Recipe]) -> rich.table.Table:
    """A table of recipes."""
    table = rich.table.Table()
    for column in ("recipe", "weights", "inputs", ""):
        table.add_column(column)
    for recipe in chosen:
        table.add_row(recipe.name, recipe.weight_formats, recipe.input_formats, recipe.summary)
    return table


def _words(names: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(name or KEEP for name in names)) or KEEP


_SDQ, _INT = "sdq32:16", "int4:32"  # both 4.5 bits an element
_SEMANTIC = rounding(
    _SDQ,
    _SDQ,
    name="semanticdialect",
    summary="mixed formats, smoothing, error feedback, decomposition, shared books",
    smooth=0.5,
    feedback=True,
    extra_work=0.12,
    sharing=Sharing(),
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        rounding(_SDQ, _SDQ, name="plain", summary="mixed formats, rounded once, nothing else"),
        rounding(
            _SDQ,
            _SDQ,
            name="plain_full_path",
            summary="plain; attention multiplies fp8 numbers",
            attention=FullPath(),
        ),
        _SEMANTIC,
        dataclasses.replace(
            _SEMANTIC,
            name="full_path",
            summary="semanticdialect; attention multiplies fp8 numbers",
            attention=FullPath(),
        ),
        rounding(
            "dialectfp4:16",
            "dialectfp4:16",
            name="blockdialect",
            summary="BlockDialect: 16 formats, two-stage choice by counting",
            select="blockdialect",
        ),
        rounding("mxfp4", "mxfp4", name="mxfp4", summary="MX: E2M1, blocks of 32"),
        rounding("nvfp4", "nvfp4", name="nvfp4", summary="NVFP4: E2M1, blocks of 16"),
        rounding(_INT, _INT, name="int4", summary="whole numbers, groups of 32"),
        rounding(
            _SDQ, name="w4a16", summary="4-bit weights with error feedback alone", feedback=True
        ),
        rounding(
            _INT,
            _INT,
            name="smoothquant",
            summary="int4; half of the inputs' range moved into the weights",
            smooth=0.5,
        ),
        Recipe(
            name="hadamard",
            summary="int4; inputs and weights rotated by Hadamard matrices",
            weights=(Rule(KERNELS, _INT),),
            inputs=(SiteRule(INPUTS, _INT, rotate=True),),
        ),
    )
}
