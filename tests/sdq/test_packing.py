import jax.numpy as jnp
import numpy as np

from sdq import packing


def test_nibbles_round_trip_all_pairs():
    low, high = np.meshgrid(np.arange(16), np.arange(16))
    codes = np.stack([low, high], axis=-1).reshape(256, 2).astype(np.uint8)
    packed = packing.pack_nibbles(jnp.asarray(codes))
    np.testing.assert_array_equal(packed[:, 0], codes[:, 0] + 16 * codes[:, 1])
    np.testing.assert_array_equal(packing.unpack_nibbles(packed), codes)


def test_even_element_lies_in_the_low_nibble():
    assert packing.pack_nibbles(jnp.array([1, 2, 3, 4], jnp.uint8)).tolist() == [0x21, 0x43]


def test_metadata_round_trips_all_256_bytes():
    byte = jnp.arange(256, dtype=jnp.uint8)
    below, dialect = packing.unpack_metadata(byte)
    assert below.max() == 7 and dialect.max() == 31
    np.testing.assert_array_equal(packing.pack_metadata(below, dialect), byte)


def test_metadata_fields():
    assert int(packing.pack_metadata(jnp.int32(5), jnp.int32(0b10111))) == 0b101_101_11
