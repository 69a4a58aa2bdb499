"""What every codec makes of a blocked array, before packing."""

from typing import NamedTuple

import jax


class Encoded(NamedTuple):
    """codes `[..., G, block]`, scales `[..., G]`, outer scales of the rank of scales or None."""

    codes: jax.Array
    scales: jax.Array
    outer: jax.Array | None
