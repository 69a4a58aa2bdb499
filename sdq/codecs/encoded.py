"""What every codec makes of a blocked array, before packing."""

from typing import NamedTuple

import jax


class Encoded(NamedTuple):
    """codes `[..., G, block]`, scales `[..., G]`, outer `[..., 1]` or `[..., 1, 1]`-like or None."""

    codes: jax.Array
    scales: jax.Array
    outer: jax.Array | None
