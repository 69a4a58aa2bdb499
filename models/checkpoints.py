"""Published checkpoints to quantised ones and back, by the name of the model."""

import os
import pathlib
from collections.abc import Callable

import sdq
from models.common.dequantize_files import dequantize_files, groups_of, nbytes_of_groups
from models.common.quantize_files import quantize_files
from models.common.recipes import Recipe, with_embedders
from models.common.source_table import TENSORS
from models.families import family_of
from sdq.checkpoint import read_leaf
from sdq.manifest import read_manifest
from sdq.progress import bytes_bar
from sdq.tensor_files import open_tensors
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
    layout = family.params.layout_of(tensors)
    with bytes_bar("quantise", sum(map(tensors.nbytes, tensors))) as on_part:
        quantize_files(
            tensors,
            family.params.sources(config, layout),
            family.params.abstract_params(config),
            recipe,
            out,
            sites=family.sites,
            ignored=family.params.IGNORED,
            metadata={
                "model": model,
                "recipe": recipe.name,
                "source": tensors.stem,
                "layout": layout,
            },
            on_part=on_part,
            on_leaf=on_leaf,
        )


def dequantize(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    shard_size: int | None = None,
) -> list[pathlib.Path]:
    """Write what `quantize` made as the safetensors that it read: their names, shapes and dtypes.

    Numbers are those that the quantised weights stand for. Tensors that are not read (IGNORED of
    the family's params) are not written. With a progress bar.

    Args:
      checkpoint: folder that `quantize` wrote.
      out: a .safetensors file, or a folder, new or empty; there files are named as the source's.
      shard_size: most bytes in a file of a folder (default: 5e9).
    Returns:
      The files; the one to open comes first.
    Raises:
      CheckpointError: no checkpoint, or a damaged one.
      ValueError: it does not tell of its source, or `out` is there already.
      OSError: no space, no permission; nothing is left.
    """
    manifest = read_manifest(checkpoint)
    told = manifest.metadata
    if missing := sorted({"model", "recipe", "source", "layout", TENSORS} - told.keys()):
        raise ValueError(
            f"{checkpoint}: its metadata does not tell of its source ({', '.join(missing)}); "
            "make it with `sdq quantize` or `sdq convert` of this version"
        )
    family = family_of(told["model"])
    sources = family.params.sources(family.sizes[told["model"]], told["layout"])
    entries = {entry.path: entry for entry in manifest.leaves}
    shapes = {path: entry.shape for path, entry in entries.items()}
    groups = groups_of(shapes, sources, told[TENSORS])
    with bytes_bar("export", nbytes_of_groups(groups)) as on_tensor:
        return dequantize_files(
            lambda path: read_leaf(checkpoint, manifest, entries[path]),
            groups,
            sources,
            out,
            metadata={
                "format": "pt",  # as published files; some programs insist
                "model": told["model"],
                "recipe": told["recipe"],
                "written_by": f"sdq {sdq.__version__}",
            },
            stem=told["source"],
            shard_size=shard_size,
            on_tensor=on_tensor,
        )
