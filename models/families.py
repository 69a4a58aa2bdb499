"""The published models by name, and what there is of each: `family_of("wan2.1-t2v-14b")`."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from flax import linen as nn

import models.mmdit.params
import models.mmdit.sites
import models.wan.params
import models.wan.sites
from models.mmdit.config import SIZES as MMDIT_SIZES
from models.mmdit.modeling import MMDiT
from models.wan.config import SIZES as WAN_SIZES
from models.wan.modeling import Wan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models that differ in their sizes.

    Attributes:
      sizes: a config for each, by name.
      model: the network; `model(config, ops, dtype)` maps x, t, text and more to the velocity.
      params: how its checkpoints are read: `layout_of`, `sources`, `abstract_params`, IGNORED.
      sites: where inputs are quantised, and which kernels read them there.
    """

    sizes: Mapping[str, Any]
    model: type[nn.Module]
    params: ModuleType
    sites: Mapping[str, Collection[str]]


FAMILIES = (
    Family(
        sizes=WAN_SIZES,
        model=Wan,
        params=models.wan.params,
        sites=models.wan.sites.SITES,
    ),
    Family(
        sizes=MMDIT_SIZES,
        model=MMDiT,
        params=models.mmdit.params,
        sites=models.mmdit.sites.SITES,
    ),
)


def names() -> list[str]:
    """Of all models."""
    return [name for family in FAMILIES for name in family.sizes]


def family_of(model: str) -> Family:
    """Whose sizes hold a model.

    Raises:
      ValueError: none; says what there is.
    """
    for family in FAMILIES:
        if model in family.sizes:
            return family
    close = difflib.get_close_matches(model, names(), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"unknown model {model!r}; there is {', '.join(names())}{hint}")
