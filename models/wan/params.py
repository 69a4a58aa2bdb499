"""Wan checkpoints as parameter trees, from both key layouts that are published."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.common.weights import (
    Layout,
    Source,
    as_stored,
    params_from_tensors,
    patch_kernel,
    transposed,
    without_batch,
)
from models.wan.config import WanConfig
from models.wan.modeling import Wan
from sdq.tensor_files import TensorFiles, open_tensors

# Our module: (name in the original checkpoints, name in diffusers'). "{}" is a block's number.
_LINEARS = {
    "text_in": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "text_out": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "time_in": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "time_out": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "time_projection": ("time_projection.1", "condition_embedder.time_proj"),
    "blocks/self_attn/q": ("blocks.{}.self_attn.q", "blocks.{}.attn1.to_q"),
    "blocks/self_attn/k": ("blocks.{}.self_attn.k", "blocks.{}.attn1.to_k"),
    "blocks/self_attn/v": ("blocks.{}.self_attn.v", "blocks.{}.attn1.to_v"),
    "blocks/self_attn/o": ("blocks.{}.self_attn.o", "blocks.{}.attn1.to_out.0"),
    "blocks/cross_attn/q": ("blocks.{}.cross_attn.q", "blocks.{}.attn2.to_q"),
    "blocks/cross_attn/k": ("blocks.{}.cross_attn.k", "blocks.{}.attn2.to_k"),
    "blocks/cross_attn/v": ("blocks.{}.cross_attn.v", "blocks.{}.attn2.to_v"),
    "blocks/cross_attn/o": ("blocks.{}.cross_attn.o", "blocks.{}.attn2.to_out.0"),
    "blocks/ffn/up": ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    "blocks/ffn/down": ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    "head": ("head.head", "proj_out"),
}
_IMAGE_LINEARS = {
    "image_embedding/up": ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    "image_embedding/down": ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    "blocks/cross_attn/k_image": ("blocks.{}.cross_attn.k_img", "blocks.{}.attn2.add_k_proj"),
    "blocks/cross_attn/v_image": ("blocks.{}.cross_attn.v_img", "blocks.{}.attn2.add_v_proj"),
}
_RMS_NORMS = {
    "blocks/self_attn/norm_q": ("blocks.{}.self_attn.norm_q", "blocks.{}.attn1.norm_q"),
    "blocks/self_attn/norm_k": ("blocks.{}.self_attn.norm_k", "blocks.{}.attn1.norm_k"),
    "blocks/cross_attn/norm_q": ("blocks.{}.cross_attn.norm_q", "blocks.{}.attn2.norm_q"),
    "blocks/cross_attn/norm_k": ("blocks.{}.cross_attn.norm_k", "blocks.{}.attn2.norm_k"),
}
_IMAGE_RMS_NORMS = {
    "blocks/cross_attn/norm_k_image": (
        "blocks.{}.cross_attn.norm_k_img",
        "blocks.{}.attn2.norm_added_k",
    ),
}
_LAYER_NORMS = {
    # The original numbers a block's norms in the order of their making, diffusers in that of use.
    "blocks/cross_norm": ("blocks.{}.norm3", "blocks.{}.norm2"),
}
_IMAGE_LAYER_NORMS = {
    "image_embedding/norm_in": ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    "image_embedding/norm_out": ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
}
_TABLES = {
    "blocks/modulation": ("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
    "head_modulation": ("head.modulation", "scale_shift_table"),
}

LAYOUTS = ("original", "diffusers")
_TELLTALES = ("head.head.weight", "proj_out.weight")  # of each layout
# Some image-to-video checkpoints carry a norm that no code reads.
IGNORED = ("blocks.{}.attn2.norm_added_q.weight",)


def load(
    path: str | os.PathLike,
    config: WanConfig,
    *,
    leaf: Callable[[str, jax.Array], Any] = lambda path, array: array,
) -> Any:
    """Read a checkpoint in either key layout, strictly.

    Args:
      path: a .safetensors file, an .index.json of shards, or a folder that holds either.
      config: of the model; `SIZES` has the published ones.
      leaf: what becomes of each leaf once it is read (`params_from_tensors`).
    Returns:
      The parameter tree, in the dtypes that are stored.
    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or not this model's weights; lists every difference.
    """
    tensors = open_tensors(path)
    found = sources(config, layout_of(tensors))
    return params_from_tensors(tensors, found, abstract_params(config), ignored=IGNORED, leaf=leaf)


def layout_of(tensors: TensorFiles) -> str:
    """Which of LAYOUTS the names follow.

    Raises:
      ValueError: neither.
    """
    for layout, telltale in zip(LAYOUTS, _TELLTALES, strict=True):
        if telltale in tensors:
            return layout
    raise ValueError(
        f"{tensors.where}: no Wan transformer: holds neither {' nor '.join(_TELLTALES)}, "
        f"but {', '.join(sorted(tensors)[:3])}, ..."
    )


def sources(config: WanConfig, layout: str) -> dict[str, Source]:
    """Where every leaf comes from in one of LAYOUTS."""
    column = LAYOUTS.index(layout)
    image = config.image_width is not None
    table: dict[str, Source] = {}

    def add(modules: dict[str, tuple[str, str]], *leaves: tuple[str, str, Layout]) -> None:
        for module, names in modules.items():
            for ours, theirs, how in leaves:
                table[module + ours] = Source(names[column] + theirs, how)

    kernel, bias = ("/kernel", ".weight", transposed), ("/bias", ".bias", as_stored)
    scale = ("/scale", ".weight", as_stored)
    add({"patch_embedding": ("patch_embedding",) * 2}, ("/kernel", ".weight", patch_kernel), bias)
    add(_LINEARS | (_IMAGE_LINEARS if image else {}), kernel, bias)
    add(_RMS_NORMS | (_IMAGE_RMS_NORMS if image else {}), scale)
    add(_LAYER_NORMS | (_IMAGE_LAYER_NORMS if image else {}), scale, bias)
    add(_TABLES, ("", "", without_batch))
    return table


def abstract_params(config: WanConfig) -> Any:
    """The tree's shapes."""
    array = jax.ShapeDtypeStruct
    arguments = [
        array((1, *config.patch, config.in_channels), jnp.float32),
        array((1,), jnp.float32),
        array((1, 1, config.text_width), jnp.float32),
    ]
    if config.image_width is not None:
        arguments.append(array((1, 1, config.image_width), jnp.float32))
    return jax.eval_shape(Wan(config).init, jax.random.key(0), *arguments)["params"]
