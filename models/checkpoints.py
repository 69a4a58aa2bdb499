"""Published checkpoints to quantised ones, by the name of the model."""

import difflib
import os
from collections.abc import Callable

from models.common.quantize_files import quantize_files
from models.common.recipes import Recipe
from models.common.tensor_files import open_tensors
from models.wan import params as wan
from models.wan.config import SIZES
from models.wan.sites import SITES
from sdq.progress import bytes_bar
from sdq.tree import LeafReport


def quantize(
    source: str | os.PathLike,
    model: str,
    recipe: Recipe,
    out: str | os.PathLike,
    on_leaf: Callable[[LeafReport], None] = lambda report: None,
) -> None:
    """Read safetensors in any published key layout, write an sdq checkpoint; with a progress bar.

    Args:
      source: a .safetensors file, an .index.json of shards, or a folder that holds either.
      model: one of `models()`.
      recipe: what happens to the weights.
      out: a new folder, or that of the same job, which was interrupted.
      on_leaf: called after each leaf.
    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown model, a damaged file or another model's, a recipe that does not fit.
    """
    config = SIZES.get(model)
    if config is None:
        close = difflib.get_close_matches(model, models(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown model {model!r}; there is {', '.join(models())}{hint}")
    tensors = open_tensors(source)
    with bytes_bar("quantise", sum(map(tensors.nbytes, tensors))) as on_part:
        quantize_files(
            tensors,
            wan.sources(config, wan.layout_of(tensors)),
            wan.abstract_params(config),
            recipe,
            out,
            sites=SITES,
            ignored=wan.IGNORED,
            metadata={"model": model, "recipe": recipe.name},
            on_part=on_part,
            on_leaf=on_leaf,
        )


def models() -> list[str]:
    """Names of those whose checkpoints are known."""
    return list(SIZES)
