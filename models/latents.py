"""Sampled latents as safetensors files, and samplings that were interrupted."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.sampler import Integration
from sdq.tensor_files import open_tensors, save_tensors

NAME = "latents"
_PARTS = ("x", "corrected", "x0", "x0_old")


def save(latents: jax.Array, facts: dict[str, Any], path: str | os.PathLike) -> None:
    """Write latents `[1, T, H, W, C]`, as the transformer makes them, and what they are of."""
    save_tensors({NAME: np.asarray(latents)}, path, {"facts": json.dumps(facts)})


def load(path: str | os.PathLike) -> tuple[np.ndarray, dict[str, Any]]:
    """Read what `save` wrote: latents `[1, T, H, W, C]` and facts.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file.
    """
    facts = facts_of(path)
    return open_tensors(path)[NAME], facts


def facts_of(path: str | os.PathLike) -> dict[str, Any]:
    """The same without the numbers."""
    tensors = open_tensors(path)
    if NAME not in tensors or "facts" not in tensors.metadata:
        raise ValueError(f"{path}: no latents that `sdq sample` wrote")
    return json.loads(tensors.metadata["facts"])


def save_unfinished(
    between: Integration, done: int, facts: dict[str, Any], path: pathlib.Path
) -> None:
    """Write where a sampling stands after `done` steps; its velocity remembers nothing."""
    parts = {name: np.asarray(getattr(between, name)) for name in _PARTS}
    save_tensors(parts, path, {"facts": json.dumps(facts), "done": str(done)})


def load_unfinished(
    facts: Sequence[dict[str, Any]], path: pathlib.Path
) -> dict[int, tuple[Integration, int]]:
    """What `save_unfinished` wrote, by which of these samplings it was of; empty if nothing.

    Raises:
      ValueError: it was of another one.
    """
    if not path.exists():
        return {}
    tensors = open_tensors(path)
    try:
        was, done = json.loads(tensors.metadata["facts"]), int(tensors.metadata["done"])
        parts = {name: jnp.asarray(tensors[name]) for name in _PARTS}
    except KeyError:
        raise ValueError(f"{path}: not what `sdq sample` leaves when it is interrupted") from None
    if was not in facts:
        wanted = facts[min(was["number"], len(facts) - 1)]
        raise ValueError(f"{path}: {difference(was, wanted)}; remove it, or give another folder")
    return {facts.index(was): (Integration(**parts, state=()), done)}


def difference(was: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What another sampling did otherwise, in words."""
    names = [name for name in {**was, **wanted} if was.get(name) != wanted.get(name)]
    told = (f"{name} was {was.get(name)!r}, now {wanted.get(name)!r}" for name in names)
    return "of another sampling: " + ", ".join(told)
