"""Published checkpoints to quantised ones, by the name of the model."""

import os
from collections.abc import Callable

from models.common.quantize_files import quantize_files
from models.common.recipes import Recipe, with_embedders
from models.common.tensor_files import open_tensors
from models.families import family_of
from sdq.progress import bytes_bar
from sdq.tree import LeafReport

# 1.6 % of Wan 14B, 0.5 % of Open-Sora 2.0: four bits would save little of it.
EMBEDDERS = "int8"


def quantize(
    source: str | os.PathLike,
    model: str,
    recipe: Recipe,
    out: str | os.PathLike,
    embedders: str = EMBEDDERS,
    on_leaf: Callable[[LeafReport], None] = lambda report: None,
) -> None:
    """Read safetensors in any published key layout, write an sdq checkpoint; with a progress bar.

    Args:
      source: a .safetensors file, an .index.json of shards, or a folder that holds either.
      model: one of `families.names()`.
      recipe: what happens to the weights.
      out: a new folder, or that of the same job, which was interrupted.
      embedders: format of what embeds time and text, or "bf16"; kept too if the recipe keeps all.
      on_leaf: called after each leaf.
    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown model, a damaged file or another model's, a recipe that does not fit.
    """
    family = family_of(model)
    if recipe.weights:
        recipe = with_embedders(recipe, embedders)
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
