"""SmoothQuant for a Wan: hard channels of the inputs made easier, the kernels that much harder.

Channel c of an input is divided by largest|x_c|^alpha / largest|W_c|^(1 - alpha) and the kernels'
rows multiplied by it (Xiao et al. 2023), wherever that can be folded into what makes the input
(`rescale.py`): everywhere but behind the GELU, at no cost while sampling.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.wan import rescale
from models.wan.sites import SITES


def smooth(dit: Any, largest: Mapping[str, jax.Array], alpha: float = 0.5) -> Any:
    """The same function with smoother inputs.

    Args:
      dit: parameters of a Wan.
      largest: magnitude of each channel by site, float32 `[blocks, K]`.
      alpha: how much of the inputs' range moves into the kernels; 1 moves all.
    """
    return rescale.rescale(
        dit, {site: _scales(dit["blocks"], site, largest[site], alpha) for site in rescale.SITES}
    )


def _scales(blocks: Any, site: str, largest: jax.Array, alpha: float) -> jax.Array:
    """What to multiply the site's channels by: `[blocks, K]` or, shared by the blocks, `[K]`."""
    rows = jnp.stack([_largest_of_rows(blocks, linear) for linear in SITES[site]]).max(axis=0)
    if not rescale.SITES[site]:
        rows, largest = rows.max(axis=0), largest.max(axis=0)
    scales = rows ** (1 - alpha) / largest**alpha
    return jnp.where((rows > 0) & (largest > 0), scales, 1.0)  # a dead channel stays as it is


def _largest_of_rows(blocks: Any, linear: str) -> jax.Array:
    module, name = linear.split("/")
    return jnp.abs(blocks[module][name]["kernel"].astype(jnp.float32)).max(axis=-1)
