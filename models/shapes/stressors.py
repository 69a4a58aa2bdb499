"""Give the small model the heavy-tailed channels of large ones, without changing its function.

Wherever a linear's input is made by something that can scale its channels freely (a norm's
modulation, a norm's weight, another linear), channel c is multiplied by s_c and the kernel's row c
divided by it. All s are powers of two, so nothing is rounded but the modulation's "1 +", and that
in float32. The inputs of `ffn/down` stay as they are: GELU does not commute with a scale.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TAIL = {8.0: 2 / 256, 4.0: 6 / 256, 2.0: 32 / 256}  # share of channels by scale


def channel_scales(random: np.random.RandomState, shape: tuple[int, ...]) -> jax.Array:
    """The scales of TAIL at random channels, 1 elsewhere; each row of `shape` its own order."""
    scales = np.ones(shape[-1])
    counts = [round(share * shape[-1]) for share in TAIL.values()]
    scales[: sum(counts)] = np.repeat(list(TAIL), counts)
    rows = [random.permutation(scales) for _ in range(int(np.prod(shape[:-1])))]
    return jnp.asarray(np.reshape(rows, shape), jnp.float32)


def stress(params: Any, seed: int = 0) -> Any:
    """The same function with other channel scales; leaves keep their dtypes, modulation is float32.

    Args:
      params: of the shapes model.
      seed: of the scales.
    """
    random = np.random.RandomState(seed)
    blocks = params["dit"]["blocks"]
    layers, _, width = blocks["modulation"].shape
    # The timestep's projection is shared by all blocks, and so are the scales behind it.
    for_attention, for_ffn = (channel_scales(random, (width,)) for _ in range(2))
    for_cross, self_values, cross_values = (
        channel_scales(random, (layers, width)) for _ in range(3)
    )
    for_text = channel_scales(random, (width,))

    scale, shift = jnp.ones((6, width)), jnp.zeros((6, width))
    for row, s in ((0, for_attention), (1, for_attention), (3, for_ffn), (4, for_ffn)):
        scale = scale.at[row].set(s)
    for row, s in ((1, for_attention), (4, for_ffn)):
        shift = shift.at[row].set(s - 1)  # s (1 + scale) = 1 + (s scale + s - 1)
    modulation = blocks["modulation"].astype(jnp.float32) * scale[None] + shift[None]

    attention, cross, ffn = blocks["self_attn"], blocks["cross_attn"], blocks["ffn"]
    attention = attention | {
        "q": _rows(attention["q"], for_attention),
        "k": _rows(attention["k"], for_attention),
        "v": _columns(_rows(attention["v"], for_attention), self_values),
        "o": _rows(attention["o"], self_values),
    }
    cross = cross | {
        "q": _rows(cross["q"], for_cross),
        "k": _rows(cross["k"], for_text),
        "v": _columns(_rows(cross["v"], for_text), cross_values),
        "o": _rows(cross["o"], cross_values),
    }
    blocks = blocks | {
        "modulation": modulation,
        "self_attn": attention,
        "cross_attn": cross,
        "cross_norm": {
            name: _times(leaf, for_cross) for name, leaf in blocks["cross_norm"].items()
        },
        "ffn": ffn | {"up": _rows(ffn["up"], for_ffn)},
    }
    dit = params["dit"] | {
        "blocks": blocks,
        "time_projection": _columns(params["dit"]["time_projection"], scale.reshape(-1)),
        "text_out": _columns(params["dit"]["text_out"], for_text),
    }
    return params | {"dit": dit}


def _times(leaf: jax.Array, s: jax.Array) -> jax.Array:
    """Multiply by s, broadcast to the leaf's shape."""
    return leaf * jnp.broadcast_to(s, leaf.shape).astype(leaf.dtype)


def _columns(linear: dict[str, jax.Array], s: jax.Array) -> dict[str, jax.Array]:
    """Multiply a linear's outputs; s is `[out]` or `[layers, out]`."""
    return {"kernel": _times(linear["kernel"], s[..., None, :]), "bias": _times(linear["bias"], s)}


def _rows(linear: dict[str, jax.Array], s: jax.Array) -> dict[str, jax.Array]:
    """Divide a linear's inputs; s is `[in]` or `[layers, in]`."""
    kernel = linear["kernel"]
    inverse = jnp.broadcast_to((1 / s)[..., None], kernel.shape).astype(kernel.dtype)
    return linear | {"kernel": kernel * inverse}
