"""The shipped weights as a parameter tree."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from models.common.weights import Source, params_from_tensors
from models.shapes.config import CONFIG
from models.shapes.modeling import Shapes
from models.shapes.stressors import stress
from models.shapes.vocabulary import CAPTION_TOKENS
from models.shapes.world import VIDEO
from sdq.rules import path_of
from sdq.tensor_files import open_tensors

WEIGHTS = pathlib.Path(__file__).parent / "shapes.safetensors"


def load(path: str | os.PathLike = WEIGHTS, *, stressed: bool = True) -> Any:
    """Read weights that `scripts.train_shapes` exported.

    Args:
      path: the safetensors file.
      stressed: give the blocks the heavy-tailed channels of large models (`stressors.py`); the
        function stays the same, four bits become hard.
    Returns:
      The parameter tree, bfloat16.
    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or not this model's weights; lists every difference.
    """
    abstract = abstract_params()
    names = {path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    sources = {name: Source(name) for name in names}
    params = params_from_tensors(open_tensors(path), sources, abstract)
    return stress(params) if stressed else params


def abstract_params() -> Any:
    """The tree's shapes."""
    return jax.eval_shape(
        Shapes(CONFIG).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, *VIDEO), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1, CAPTION_TOKENS), jnp.int32),
    )["params"]
