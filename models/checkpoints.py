"""Published checkpoints to quantised ones, by the name of the model."""

import os
from collections.abc import Callable

from models.common.quantize_files import quantize_files
from models.common.recipes import Recipe
from models.families import family_of
from sdq.progress import bytes_bar
from sdq.tensor_files import open_tensors
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
      model: one of `families.names()`.
      recipe: what happens to the weights.
      out: a new folder, or that of the same job, which was interrupted.
      on_leaf: called after each leaf.
    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown model, a damaged file or another model's, a recipe that does not fit.
    """
    family = family_of(model)
    config = family.sizes[model]
    tensors = open_tensors(source)
    with bytes_bar("quantise", sum(map(tensors.nbytes, tensors))) as on_part:
        quantize_files(
            tensors,
            family.params.sources(config, family.params.layout_of(tensors)),
            family.params.abstract_params(config),
            recipe,
            out,
            sites=family.sites,
            ignored=family.params.IGNORED,
            metadata={"model": model, "recipe": recipe.name},
            on_part=on_part,
            on_leaf=on_leaf,
        )
