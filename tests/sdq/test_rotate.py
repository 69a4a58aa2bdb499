import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdq import dequantize, quantize, sqnr_db
from sdq.rotate import hadamard, largest_group


def matrix(size):
    """Sylvester's construction, normalised."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(size)


@pytest.mark.parametrize("group", [1, 2, 8, 32])
def test_each_group_is_multiplied_by_the_matrix(rng, group):
    x = rng.randn(3, 5, 96).astype(np.float32)
    expected = (x.reshape(3, 5, -1, group) @ matrix(group)).reshape(x.shape)
    np.testing.assert_allclose(hadamard(jnp.asarray(x), group), expected, atol=1e-5)


def test_it_undoes_itself_and_keeps_products(rng):
    x, w = (jnp.asarray(rng.randn(*shape), jnp.float32) for shape in ((7, 64), (64, 5)))
    np.testing.assert_allclose(hadamard(hadamard(x, 64), 64), x, atol=1e-5)
    product = hadamard(x, 16) @ hadamard(w, 16, axis=-2)
    np.testing.assert_allclose(product, x @ w, atol=1e-4)


def test_outliers_cost_less_when_they_are_spread(rng):
    x = jnp.asarray(rng.randn(64, 256), jnp.float32).at[:, 17].multiply(40)
    plain = float(sqnr_db(x, dequantize(quantize(x, "int4"))))
    rotated = hadamard(dequantize(quantize(hadamard(x, 256), "int4")), 256)
    assert float(sqnr_db(x, rotated)) > plain + 3


def test_dtype_stays():
    x = jax.random.normal(jax.random.key(0), (4, 32), jnp.bfloat16)
    assert hadamard(x, 32).dtype == jnp.bfloat16


@pytest.mark.parametrize(("width", "group"), [(5120, 1024), (13824, 512), (1536, 512), (7, 1)])
def test_largest_group_divides(width, group):
    assert largest_group(width) == group


@pytest.mark.parametrize("group", [0, 3, 128])
def test_other_groups_are_refused(group):
    with pytest.raises(ValueError, match="power of two that divides 96"):
        hadamard(jnp.ones((2, 96)), group)


def test_no_width_is_refused():
    with pytest.raises(ValueError, match="width"):
        largest_group(0)
