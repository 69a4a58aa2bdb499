"""Give the small model the heavy-tailed channels of large ones, without changing its function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.wan.rescale import rescale

TAIL = {8.0: 2 / 256, 4.0: 6 / 256, 2.0: 32 / 256}  # share of channels by scale


def channel_scales(random: np.random.RandomState, shape: tuple[int, ...]) -> jax.Array:
    """The scales of TAIL at random channels, 1 elsewhere; each row of `shape` its own order."""
    scales = np.ones(shape[-1])
    counts = [round(share * shape[-1]) for share in TAIL.values()]
    scales[: sum(counts)] = np.repeat(list(TAIL), counts)
    rows = [random.permutation(scales) for _ in range(int(np.prod(shape[:-1])))]
    return jnp.asarray(np.reshape(rows, shape), jnp.float32)


def stress(params: Any, seed: int = 0) -> Any:
    """The same function with other channel scales (`models/wan/rescale.py`).

    Args:
      params: of the shapes model.
      seed: of the scales.
    """
    random = np.random.RandomState(seed)
    layers, _, width = params["dit"]["blocks"]["modulation"].shape
    # The order of the draws is part of the bundled model.
    scales = {
        site: channel_scales(random, shape)
        for site, shape in (
            ("blocks/self_attn/qkv", (width,)),
            ("blocks/ffn/up", (width,)),
            ("blocks/cross_attn/q", (layers, width)),
            ("blocks/self_attn/o", (layers, width)),
            ("blocks/cross_attn/o", (layers, width)),
            ("blocks/cross_attn/kv", (width,)),
        )
    }
    return params | {"dit": rescale(params["dit"], scales)}
