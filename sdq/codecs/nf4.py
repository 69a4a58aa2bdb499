"""NF4 (QLoRA): 16 quantiles of a normal distribution in [-1, 1], one bfloat16 absmax a block.

A code is the index of the nearest level, ties to the lower level. A NaN scale marks every block of
a bad row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sdq.codecs.encoded import Encoded
from sdq.formats import Format
from sdq.numerics import largest_magnitude, row_is_bad, without_subnormals
from sdq.select import Choice

# Table E of the QLoRA paper (arXiv 2305.14314), float32.
LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / 2
LARGEST_SCALE = float(jnp.finfo(jnp.bfloat16).max)


def encode(x: jax.Array, fmt: Format, choice: Choice) -> Encoded:
    """float32 `[..., G, block]` -> codes uint8 0..15, bfloat16 scales `[..., G]`."""
    amax = largest_magnitude(x)
    bad = row_is_bad(amax)
    amax = jnp.where(bad, 0.0, amax)
    scale = jnp.minimum(amax, LARGEST_SCALE).astype(jnp.bfloat16)
    step = scale.astype(jnp.float32)[..., None]
    usable = (step > 0) & ~bad[..., None]
    y = jnp.where(usable, without_subnormals(x) / jnp.where(usable, step, 1.0), 0.0)
    codes = jnp.zeros(x.shape, jnp.uint8)
    for middle in MIDPOINTS.tolist():
        codes += (y > middle).astype(jnp.uint8)
    return Encoded(codes=codes, scales=jnp.where(bad, jnp.bfloat16(jnp.nan), scale), outer=None)


def decode(encoded: Encoded, fmt: Format) -> jax.Array:
    """float32 `[..., G, block]`."""
    level = jnp.asarray(LEVELS)[encoded.codes.astype(jnp.int32)]
    return level * encoded.scales.astype(jnp.float32)[..., None]


def problems(encoded: Encoded, fmt: Format) -> dict[str, jax.Array]:
    """What this format can never produce: whether the arrays hold it, by its description."""
    return {"a scale is negative": jnp.any(encoded.scales < 0)}
