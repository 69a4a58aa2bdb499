"""Rescale the inputs of a Wan's linears channel by channel without changing the function.

Wherever an input is made by something that can scale its channels freely (a norm's modulation, a
norm's weight, another linear), channel c is multiplied by s_c and the kernel's row c divided by it.
With powers of two nothing is rounded but the modulation's "1 +", and that in float32. The inputs of
`ffn/down` stay as they are: GELU does not commute with a scale.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Sites and whether each block has scales of its own. The timestep's projection and the text's
# embedding are shared by all blocks, and so are the scales behind them.
SITES = {
    "blocks/self_attn/qkv": False,
    "blocks/self_attn/o": True,
    "blocks/cross_attn/q": True,
    "blocks/cross_attn/kv": False,
    "blocks/cross_attn/o": True,
    "blocks/ffn/up": False,
}


def rescale(dit: Any, scales: Mapping[str, jax.Array]) -> Any:
    """The same function with other channel scales; leaves keep their dtypes, modulation is float32.

    Args:
      dit: parameters of a Wan.
      scales: float32 by site, for each of SITES: `[blocks, D]` where each block has its own, else
        `[D]`.
    Raises:
      ValueError: a site is missing or unknown.
    """
    if scales.keys() != SITES.keys():
        raise ValueError(f"scales: expected {', '.join(SITES)}, got {', '.join(scales)}")
    of = {site.removeprefix("blocks/"): s for site, s in scales.items()}
    blocks = dit["blocks"]
    width = blocks["modulation"].shape[-1]

    scale, shift = jnp.ones((6, width)), jnp.zeros((6, width))
    for first, s in ((0, of["self_attn/qkv"]), (3, of["ffn/up"])):  # rows: shift, scale
        scale = scale.at[first].set(s).at[first + 1].set(s)
        shift = shift.at[first + 1].set(s - 1)  # s (1 + scale) = 1 + (s scale + s - 1)
    modulation = blocks["modulation"].astype(jnp.float32) * scale[None] + shift[None]

    attention, cross, ffn = blocks["self_attn"], blocks["cross_attn"], blocks["ffn"]
    attention = attention | {
        "q": _rows(attention["q"], of["self_attn/qkv"]),
        "k": _rows(attention["k"], of["self_attn/qkv"]),
        "v": _columns(_rows(attention["v"], of["self_attn/qkv"]), of["self_attn/o"]),
        "o": _rows(attention["o"], of["self_attn/o"]),
    }
    cross = cross | {
        "q": _rows(cross["q"], of["cross_attn/q"]),
        "k": _rows(cross["k"], of["cross_attn/kv"]),
        "v": _columns(_rows(cross["v"], of["cross_attn/kv"]), of["cross_attn/o"]),
        "o": _rows(cross["o"], of["cross_attn/o"]),
    }
    norm = {name: _times(leaf, of["cross_attn/q"]) for name, leaf in blocks["cross_norm"].items()}
    return dit | {
        "blocks": blocks
        | {
            "modulation": modulation,
            "self_attn": attention,
            "cross_attn": cross,
            "cross_norm": norm,
            "ffn": ffn | {"up": _rows(ffn["up"], of["ffn/up"])},
        },
        "time_projection": _columns(dit["time_projection"], scale.reshape(-1)),
        "text_out": _columns(dit["text_out"], of["cross_attn/kv"]),
    }


def _times(leaf: jax.Array, s: jax.Array) -> jax.Array:
    """Multiply by s, broadcast to the leaf's shape."""
    return leaf * jnp.broadcast_to(s, leaf.shape).astype(leaf.dtype)


def _columns(linear: dict[str, jax.Array], s: jax.Array) -> dict[str, jax.Array]:
    """Multiply a linear's outputs; s is `[out]` or `[blocks, out]`."""
    return {"kernel": _times(linear["kernel"], s[..., None, :]), "bias": _times(linear["bias"], s)}


def _rows(linear: dict[str, jax.Array], s: jax.Array) -> dict[str, jax.Array]:
    """Divide a linear's inputs; s is `[in]` or `[blocks, in]`."""
    kernel = linear["kernel"]
    inverse = jnp.broadcast_to((1 / s)[..., None], kernel.shape).astype(kernel.dtype)
    return linear | {"kernel": kernel * inverse}
