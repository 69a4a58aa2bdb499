"""Bits in bytes: two 4-bit codes a byte, and the metadata byte of a dialect block.

The only file that knows the nibble order (even element in the low nibble, as torchao, ModelOpt and
compressed-tensors store it) and where the fields of a metadata byte lie.
"""

import jax
import jax.numpy as jnp


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """uint8 codes below 16, `[..., K]` with K even -> uint8 `[..., K / 2]`."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: jax.Array) -> jax.Array:
    """The inverse of pack_nibbles: uint8 `[..., K / 2]` -> uint8 codes `[..., K]`."""
    pairs = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_metadata(exponent_below_row: jax.Array, dialect: jax.Array) -> jax.Array:
    """Block exponent below the row's (0..7) and dialect id (0..31) -> one uint8 a block.

    The byte reads `[exponent below the row's : 3 | top : 3 | shape : 2]`.
    """
    return (exponent_below_row.astype(jnp.uint8) << 5) | dialect.astype(jnp.uint8)


def unpack_metadata(metadata: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of pack_metadata, both int32."""
    return (metadata >> 5).astype(jnp.int32), (metadata & 31).astype(jnp.int32)
