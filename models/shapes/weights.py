"""The shipped weights as a parameter tree."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.tensor_files import open_tensors
from models.shapes.config import CONFIG
from models.shapes.modeling import Shapes
from models.shapes.stressors import stress
from models.shapes.vocabulary import CAPTION_TOKENS
from models.shapes.world import VIDEO
from sdq.rules import path_of

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
    tensors = open_tensors(path)
    expected = {
        path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract_params())
    }
    problems = [f"- {name}: missing" for name in expected.keys() - tensors.keys()]
    problems += [f"+ {name}: not a weight of this model" for name in tensors.keys() - expected]
    for name in expected.keys() & tensors.keys():
        if tensors.shape(name) != expected[name].shape:
            problems.append(
                f"! {name}: expected {list(expected[name].shape)}, got {list(tensors.shape(name))}"
            )
        elif not np.isfinite(np.asarray(tensors[name], np.float32)).all():
            problems.append(f"! {name}: holds NaN or Inf")
    if problems:
        raise ValueError(f"{path} is no shapes model:\n  " + "\n  ".join(sorted(problems)))
    params = jax.tree_util.tree_map_with_path(
        lambda keys, _: jnp.asarray(tensors[path_of(keys)]), abstract_params()
    )
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
