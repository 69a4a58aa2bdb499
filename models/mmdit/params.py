"""MMDiT checkpoints as parameter trees, from all key layouts that are published."""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.weights import (
    Layout,
    Source,
    as_stored,
    in_turn,
    params_from_tensors,
    transposed,
)
from models.mmdit.config import MMDiTConfig
from models.mmdit.key_names import (
    COLUMNS,
    COND,
    CONVOLUTION,
    GUIDANCE,
    HEAD,
    HEAD_MODULATION,
    HEAD_NORMS,
    LAYOUTS,
    LINEAR,
    LINEARS,
    PROJECTIONS,
    REFINER,
    REFINER_NORMS,
    REFINER_PROJECTIONS,
    TEXT,
    Name,
)
from models.mmdit.modeling import MMDiT
from sdq.tensor_files import TensorFiles, open_tensors

IGNORED = ()  # tensors that may be there and are not read


def load(
    path: str | os.PathLike,
    config: MMDiTConfig,
    *,
    half_split: bool | None = None,
    leaf: Callable[[str, jax.Array], Any] = lambda path, array: array,
) -> Any:
    """Read a checkpoint in any of LAYOUTS, strictly.

    Args:
      path: a .safetensors file, an .index.json of shards, or a folder that holds either.
      config: of the model; `SIZES` has the published ones.
      half_split: see `sources`.
      leaf: what becomes of each leaf once it is read (`params_from_tensors`).
    Returns:
      The parameter tree, in the dtypes that are stored.
    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or not this model's weights; lists every difference.
    """
    tensors = open_tensors(path)
    found = sources(config, layout_of(tensors), half_split=half_split)
    return params_from_tensors(tensors, found, abstract_params(config), leaf=leaf)


def layout_of(tensors: TensorFiles) -> str:
    """Which of LAYOUTS the names follow.

    Raises:
      ValueError: none.
    """
    for layout, telltale in LAYOUTS.items():
        if telltale in tensors:
            return layout
    raise ValueError(
        f"{tensors.where}: no MMDiT: holds none of {', '.join(LAYOUTS.values())}, "
        f"but {', '.join(sorted(tensors)[:3])}, ..."
    )


def sources(
    config: MMDiTConfig, layout: str, *, half_split: bool | None = None
) -> dict[str, Source]:
    """Where every leaf comes from.

    Args:
      config: of the model.
      layout: one of LAYOUTS.
      half_split: whether rotary embedding turns channels (i, i + n / 2) of n in a head, not
        (2i, 2i + 1): no name tells. None: in "open-sora" it does, elsewhere it does not, as in
        what is published.
    Raises:
      ValueError: no model of this layout has a part that this config has.
    """
    half_split = layout == "open-sora" if half_split is None else half_split
    pairs = functools.partial(_pairs, width=config.head_width) if half_split else as_stored
    table: dict[str, Source] = {}

    def name(ours: str, names: Name) -> str:
        theirs = names[COLUMNS[layout]]
        if theirs is None:
            raise ValueError(f"no checkpoint of the {layout} layout has this config's {ours}")
        return theirs

    def add(ours: str, theirs: str, rows: Layout = as_stored) -> None:
        """A linear; `rows` is applied to weight and bias alike."""
        table[f"{ours}/kernel"] = Source(f"{theirs}.weight", in_turn(rows, transposed))
        table[f"{ours}/bias"] = Source(f"{theirs}.bias", rows)

    refiner = config.refiner_blocks > 0
    linears = {**LINEARS, **(GUIDANCE if config.guidance else {})}
    for ours, names in (linears | dict(REFINER if refiner else TEXT)).items():
        add(ours, name(ours, names))
    projections = dict(PROJECTIONS[layout])
    if refiner:
        projections |= REFINER_PROJECTIONS[layout]
    for theirs, parts in projections.items():
        for number, ours in enumerate(parts):
            # The last takes all that follow, so that a tensor of another height cannot pass.
            last = None if number + 1 == len(parts) else (number + 1) * config.width
            rows = functools.partial(_rows, first=number * config.width, last=last)
            turned = ours[-2:] in ("/q", "/k") and not ours.startswith("refiner")
            add(ours, theirs, in_turn(rows, pairs) if turned else rows)
    for ours, names in HEAD_NORMS.items():
        table[f"{ours}/scale"] = Source(name(ours, names), pairs)
    for ours, names in REFINER_NORMS.items() if refiner else ():
        table[f"{ours}/scale"] = Source(f"{name(ours, names)}.weight")
        table[f"{ours}/bias"] = Source(f"{name(ours, names)}.bias")

    pixels = math.prod(config.patch)
    patches = {"img_in": CONVOLUTION if refiner else LINEAR}
    if config.cond_channels is not None:
        patches["cond_in"] = COND
    for ours, names in patches.items():
        theirs = name(ours, names)
        kernel = functools.partial(_patch_kernel, pixels=pixels)
        table[f"{ours}/kernel"] = Source(f"{theirs}.weight", kernel)
        table[f"{ours}/bias"] = Source(f"{theirs}.bias")
    add("head", name("head", HEAD), functools.partial(_channels_last, pixels=pixels))
    halves = _swapped if layout == "diffusers" else as_stored
    add("head_modulation", name("head_modulation", HEAD_MODULATION), halves)
    return table


def abstract_params(config: MMDiTConfig) -> Any:
    """The tree's shapes."""
    array = jax.ShapeDtypeStruct
    video = (1, *config.patch)
    arguments = [
        array((*video, config.in_channels), jnp.float32),
        array((1,), jnp.float32),
        array((1, 1, config.text_width), jnp.float32),
        array((1, config.pooled_width), jnp.float32),
    ]
    options = {}
    if config.guidance:
        options["guidance"] = array((1,), jnp.float32)
    if config.cond_channels is not None:
        options["cond"] = array((*video, config.cond_channels), jnp.float32)
    return jax.eval_shape(MMDiT(config).init, jax.random.key(0), *arguments, **options)["params"]


def _rows(tensor: np.ndarray, first: int, last: int | None) -> np.ndarray:
    return tensor[first:last]


def _pairs(tensor: np.ndarray, width: int) -> np.ndarray:
    """Rows of heads: channels (i, i + width / 2) become (2i, 2i + 1)."""
    halves = tensor.reshape(-1, 2, width // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _swapped(tensor: np.ndarray) -> np.ndarray:
    """Rows of (scale, shift) -> (shift, scale)."""
    return np.roll(tensor, len(tensor) // 2, axis=0)


def _channels_last(tensor: np.ndarray, pixels: int) -> np.ndarray:
    """Rows (channel, pixel of a patch) -> (pixel, channel)."""
    by_channel = tensor.reshape(-1, pixels, *tensor.shape[1:])
    return by_channel.swapaxes(0, 1).reshape(tensor.shape)


def _patch_kernel(tensor: np.ndarray, pixels: int) -> np.ndarray:
    """`[D, C * pixels]`, or the same as a convolution's axes -> `[pixels * C, D]`."""
    return tensor.reshape(len(tensor), -1, pixels).transpose(2, 1, 0).reshape(-1, len(tensor))
