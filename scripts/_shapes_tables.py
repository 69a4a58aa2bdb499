"""What `make_shapes_table` measures: four tables, as data."""

import dataclasses

from models.common.full_path import FullPath
from models.common.quantizer import SiteRule
from models.common.recipes import INPUTS, RECIPES, Recipe, rounding, with_embedders
from sdq import format_table

FULL = RECIPES["semanticdialect"]
SDQ = "sdq32:16"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One results page.

    Attributes:
      stem: of its files.
      title: of the page.
      text: what it shows, in sentences.
      groups: recipes by heading; "" for none.
      columns: of `make_shapes_table.COLUMNS`.
      seeds: of captions and noise.
      consistency: compare how the tokens of one thing are rounded.
      against: the recipe that all are compared with, prompt by prompt.
    """

    stem: str
    title: str
    text: str
    groups: dict[str, tuple[Recipe, ...]]
    columns: tuple[str, ...]
    seeds: int = 1
    consistency: bool = False
    against: Recipe | None = None

    @property
    def recipes(self) -> dict[str, Recipe]:
        """All, by name; one that stands in several groups is measured once."""
        return {recipe.name: recipe for group in self.groups.values() for recipe in group}


def _full(name: str, **changes) -> Recipe:
    """The full recipe with something changed."""
    return dataclasses.replace(FULL, name=name, **changes)


def _shared(name: str, **changes) -> Recipe:
    assert FULL.sharing is not None
    return _full(name, sharing=dataclasses.replace(FULL.sharing, **changes))


PLAIN = RECIPES["plain"]
ALONE = _full("without SeDA", sharing=None)

COMMON = (
    "Right: videos in which the detectors find everything that the caption says; lost: points "
    "against bf16, prompt by prompt. PSNR and SSIM: against bf16 from the same noise. SQNR: of "
    "the velocity where bf16 was, mean over the steps. ± standard error. The floor is bf16 "
    "with its sums in another order."
)
INCONSISTENCY = (
    "Inconsistency: how differently two tokens of one thing round the same numbers, root mean "
    "square as a share of the numbers, over all pairs of tokens of a thing."
)


def _gained(against: str) -> str:
    return (
        f"Gained: against {against}, prompt by prompt; PSNR also where things stay, grow or shrink "
        "(low motion) and where they travel (high)."
    )


MEASURED = ("right %", "lost", "PSNR dB", "SSIM", "SQNR dB", "flicker", "along the motion")

FORMATS = Table(
    stem="shapes_formats",
    title="The shapes model under every format",
    text="Plain rounding of the blocks' weights and of the inputs of their linears, nothing else. "
    + COMMON,
    groups={
        "": (
            *(rounding(name, name) for name in format_table.FORMATS),
            rounding(SDQ),
            rounding(acts=SDQ),
            rounding("mxfp4"),
            rounding(acts="mxfp4"),
        )
    },
    columns=("weights", "activations", *MEASURED),
)

COMPARED = ("SQNR gained", "PSNR gained", "low motion", "high motion")

RECIPE_TABLE = Table(
    stem="shapes_recipes",
    title="The shapes model under every recipe",
    text="Recipes as `sdq recipes` lists them. " + COMMON + " Extra work: matrix products that "
    f"decomposition adds, of those of the blocks' linears. {_gained('nvfp4')}",
    groups={"": tuple(recipe for recipe in RECIPES.values() if recipe.attention is None)},
    columns=("recipe", "weights", "activations", "extra work %", *MEASURED, *COMPARED),
    seeds=3,
    against=RECIPES["nvfp4"],
)

ABLATION = Table(
    stem="shapes_ablation",
    title="What each part of SemanticDialect does on the shapes model",
    text="4.5 bits for weights and activations unless said. "
    + COMMON
    + f" {INCONSISTENCY} {_gained('semanticdialect')}",
    groups={
        "One part alone": (
            PLAIN,
            rounding(SDQ, SDQ, name="smoothing", smooth=FULL.smooth),
            rounding(SDQ, SDQ, name="feedback", feedback=True),
            _full("decomposition", smooth=None, feedback=False, sharing=None),
            _full("SeDA", smooth=None, feedback=False, extra_work=0.0),
        ),
        "All but one": (
            FULL,
            _full("without smoothing", smooth=None),
            _full("without feedback", feedback=False),
            _full("without decomposition", extra_work=0.0),
            ALONE,
        ),
        "The choice of dialects, blocks of 32": (
            rounding(SDQ, SDQ, name="lut", select="lut"),
            rounding("sdq32:32", "sdq32:32", name="blocks of 32"),
            rounding("sdq32:32", "sdq32:32", name="blocks of 32, lut", select="lut"),
            RECIPES["mxfp4"],
            RECIPES["blockdialect"],
        ),
        "What others gain from the same": (
            RECIPES["nvfp4"],
            rounding("nvfp4", "nvfp4", name="nvfp4 + feedback", feedback=True),
            rounding(
                "nvfp4",
                "nvfp4",
                name="nvfp4 + smoothing + feedback",
                smooth=FULL.smooth,
                feedback=True,
            ),
            Recipe(
                name="sdq32 + hadamard",
                weights=PLAIN.weights,
                inputs=(SiteRule(INPUTS, SDQ, rotate=True),),
            ),
        ),
        "Smoothing": (
            _full("alpha 0.3", smooth=0.3),
            FULL,
            _full("alpha 0.7", smooth=0.7),
        ),
        "Extra work": (
            *(_full(f"at most {share:.0%} extra work", extra_work=share) for share in (0.03, 0.06)),
            FULL,
            _full("at most 24% extra work", extra_work=0.24),
        ),
        "Decomposed tokens": (
            _full("10% of the tokens", salient=0.1),
            _full("20% of the tokens", salient=0.2),
            _full("20%, salient by self-attention", salient=0.2, saliency="self"),
            _full("20%, salient by error", salient=0.2, saliency="error"),
            _full("40% of the tokens", salient=0.4),
        ),
        "SeDA: where": (
            ALONE,
            FULL,
            _shared("layers with 30% of the noise", noise=0.3),
            _shared("all layers", noise=1.0),
        ),
        "SeDA: what a group shares, all layers": (
            _shared("one book for all channels", noise=1.0, by_block=False),
            _shared("two shapes a top", noise=1.0, members=2),
        ),
        "SeDA: who shares": (
            _shared("more alike (0.8)", least=0.8),
            _shared("16 groups", anchors=16),
            _shared("window of the frame", window=(0, 8, 8)),
            _shared("window of the tube", window=(8, 2, 2)),
            _shared("alike by self-attention", alike="attention", least=1.0, anchors=32),
        ),
        "SeDA: refresh": tuple(
            _full(words, refresh_every=every)
            for every, words in ((2, "every 2 steps"), (12, "every 12 steps"), (0, "once"))
        ),
        "Attention too": (
            RECIPES["full_path"],
            _full("4-bit attention", attention=FullPath(fmt_qk=SDQ, fmt_pv=SDQ)),
        ),
    },
    columns=("recipe", "extra work %", "inconsistency %", *MEASURED, *COMPARED),
    seeds=3,
    consistency=True,
    against=FULL,
)

SHARING = Table(
    stem="shapes_sharing",
    title="What sharing sub-formatbooks costs where things move",
    text="semanticdialect with and without SeDA, and with tokens that must be more alike to share. "
    + COMMON
    + f" {INCONSISTENCY} {_gained('no sharing')}",
    groups={
        "": (
            ALONE,
            FULL,
            _shared("alike by 0.65", least=0.65),
        )
    },
    columns=("recipe", "inconsistency %", *MEASURED, *COMPARED),
    seeds=8,
    consistency=True,
    against=ALONE,
)

PUBLISHED = Table(
    stem="shapes_published",
    title="What `sdq quantize` does to published models, done to the shapes model",
    text="Recipes that need no scan, and embedders: kernels outside of the blocks, but for the "
    "first and the last; their inputs stay. " + COMMON + " " + _gained("plain"),
    groups={
        "Embedders alone": tuple(
            Recipe(name=f"embedders {fmt}", weights=with_embedders(Recipe(name=""), fmt).weights)
            for fmt in ("int8", SDQ)
        ),
        "Beside the blocks": (
            PLAIN,
            *(
                dataclasses.replace(with_embedders(PLAIN, fmt), name=f"plain, embedders {fmt}")
                for fmt in ("int8", SDQ)
            ),
            RECIPES["plain_full_path"],
        ),
    },
    columns=("recipe", *MEASURED, *COMPARED),
    against=PLAIN,
)

TABLES = {
    "formats": FORMATS,
    "recipes": RECIPE_TABLE,
    "ablation": ABLATION,
    "sharing": SHARING,
    "published": PUBLISHED,
}
