import jax.numpy as jnp
import numpy as np

from models.common.rope import rope_table
from pallas_kernels.projected import apply_rope


def test_table_counts_time_slowest():
    cos, sin = rope_table((2, 3, 4), (4, 2, 2), 100.0)
    assert cos.shape == sin.shape == (24, 4)
    t, h, w = 1, 2, 3
    angles = [t, t * 100.0**-0.5, h, w]
    np.testing.assert_allclose(cos[(t * 3 + h) * 4 + w], np.cos(angles), rtol=1e-6)
    np.testing.assert_allclose(sin[(t * 3 + h) * 4 + w], np.sin(angles), rtol=1e-6)


def test_far_positions_keep_float64_angles():
    _, sin = rope_table((1, 1, 100_000), (0, 0, 2), 1e4)
    np.testing.assert_allclose(sin[-1, 0], np.sin(99_999.0), rtol=1e-6)


def test_product_depends_on_the_distance_only(rng):
    table = rope_table((8, 1, 1), (6, 0, 0), 50.0)
    q, k = (jnp.asarray(np.tile(rng.randn(6), (8, 1)), jnp.float32) for _ in range(2))
    q, k = (np.asarray(apply_rope(x[None, :, None], *table))[0, :, 0] for x in (q, k))
    products = q @ k.T
    for shift in range(-7, 8):
        diagonal = np.diagonal(products, shift)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)


def test_pairs_are_interleaved_and_turn(rng):
    x = jnp.asarray([[1.0, 0.0, 0.0, 2.0]])[None, :, None]
    cos, sin = jnp.zeros((1, 2)), jnp.ones((1, 2))
    np.testing.assert_allclose(apply_rope(x, cos, sin)[0, 0, 0], [0, 1, -2, 0], atol=1e-7)


def test_dtype_is_kept():
    x = jnp.ones((1, 4, 1, 6), jnp.bfloat16)
    assert apply_rope(x, *rope_table((4, 1, 1), (2, 2, 2), 1e4)).dtype == jnp.bfloat16
