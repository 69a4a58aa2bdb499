"""What a model reads of prompts, as one safetensors file: written once, sampled from often.

Names are those of the model's arguments ("text", "pooled", "text_lengths"), a row for each prompt;
"negative/<name>" are those of the text that guidance leads away from, one row.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdq.tensor_files import open_tensors, save_tensors

NEGATIVE = "negative/"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Prompts, and what encoders made of them.

    Attributes:
      prompts: as they were given.
      arrays: `[prompts, ...]` each, by the model's argument.
      negative: the same of one text, `[1, ...]` each; empty where guidance needs none.
      text: which encoders, one of `text_encoders.ENCODERS`.
      negative_prompt: of `negative`.
    """

    prompts: Sequence[str]
    arrays: Mapping[str, np.ndarray]
    negative: Mapping[str, np.ndarray]
    text: str
    negative_prompt: str = ""


def save(embeddings: Embeddings, path: str | os.PathLike) -> None:
    """Write one file, whole or not at all."""
    arrays = dict(embeddings.arrays)
    arrays |= {NEGATIVE + name: array for name, array in embeddings.negative.items()}
    metadata = {
        "text": embeddings.text,
        "prompts": json.dumps(list(embeddings.prompts)),
        "negative_prompt": embeddings.negative_prompt,
    }
    save_tensors(arrays, path, metadata)


def load(path: str | os.PathLike) -> Embeddings:
    """Read what `save` wrote.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file, or numbers that are not finite.
    """
    tensors = open_tensors(path)
    try:
        prompts = json.loads(tensors.metadata["prompts"])
        text, negative_prompt = tensors.metadata["text"], tensors.metadata["negative_prompt"]
    except (KeyError, ValueError):
        raise ValueError(f"{path}: no embeddings that `sdq encode` wrote") from None
    arrays: dict[str, Any] = {}
    negative: dict[str, Any] = {}
    for name in tensors:
        array = tensors[name]
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{path}: {name}: holds NaN or Inf; encode the prompts again")
        is_negative = name.startswith(NEGATIVE)
        (negative if is_negative else arrays)[name.removeprefix(NEGATIVE)] = array
        if len(array) != (1 if is_negative else len(prompts)):
            raise ValueError(f"{path}: {name}: {len(array)} rows for {len(prompts)} prompts")
    return Embeddings(
        prompts=prompts,
        arrays=arrays,
        negative=negative,
        text=text,
        negative_prompt=negative_prompt,
    )
