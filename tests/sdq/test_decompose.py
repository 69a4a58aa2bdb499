import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdq import dequantize, fake_quantize, quantize, sqnr_db
from sdq.decompose import Decomposed, multiply, residual

FORMAT = "sdq32:16"


def decompose(x, base, tokens):
    left = residual(x, base, tokens, FORMAT, "two_stage")
    return Decomposed(base=base, residual=left, tokens=tokens, active=jnp.array(True))


@pytest.fixture
def made():
    """x, its Decomposed, a kernel."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, 20, 64))
    tokens = jnp.array([[3, 7, 19], [0, 1, 2]], jnp.int32)
    base = fake_quantize(x, FORMAT, select="two_stage")
    x_both = decompose(x, base, tokens)
    return x, x_both, jax.random.normal(keys[1], (64, 24))


def product(x, kernel, active=True):
    active = None if active is None else jnp.array(active)
    x = x.__class__(base=x.base, residual=x.residual, tokens=x.tokens, active=active)
    return jax.jit(lambda x: multiply(x, lambda rows: rows @ kernel))(x)


def test_salient_tokens_have_eight_bits_and_the_others_four(made):
    x, x_both, kernel = made
    y = product(x_both, kernel)
    salient = np.zeros((2, 20), bool)
    np.put_along_axis(salient, np.asarray(x_both.tokens), True, axis=1)
    exact = x @ kernel
    assert float(sqnr_db(exact[salient], y[salient])) > 38
    assert 18 < float(sqnr_db(exact[~salient], y[~salient])) < 25


def test_equals_the_product_of_the_sum(made):
    _, x_both, kernel = made
    summed = x_both.base
    for b in range(2):
        summed = summed.at[b, x_both.tokens[b]].add(x_both.residual[b])
    np.testing.assert_allclose(product(x_both, kernel), summed @ kernel, atol=1e-4)


def test_the_residual_is_a_quantised_array(made):
    x, x_both, _ = made
    rows = jnp.take_along_axis(x - x_both.base, x_both.tokens[..., None], axis=1)
    again = dequantize(quantize(rows, FORMAT, select="two_stage"))
    np.testing.assert_array_equal(x_both.residual, again)


def test_always_is_active(made):
    _, x_both, kernel = made
    np.testing.assert_array_equal(product(x_both, kernel, None), product(x_both, kernel))


def test_inactive_costs_and_changes_nothing(made):
    _, x_both, kernel = made
    np.testing.assert_array_equal(product(x_both, kernel, active=False), x_both.base @ kernel)

    rows = []

    def counted(part):
        rows.append(part.shape[1])
        return part @ kernel

    multiply(x_both, counted)
    assert sorted(rows) == [3, 20]  # the three in a branch that runs only where active


def test_bfloat16_holds_both_terms_exactly():
    x = jax.random.normal(jax.random.key(1), (1, 8, 32), jnp.bfloat16)
    base = fake_quantize(x, FORMAT, select="two_stage")
    both = decompose(x, base, jnp.array([[1, 2]]))
    left = (x.astype(jnp.float32) - base.astype(jnp.float32))[:, 1:3]
    want = fake_quantize(left, FORMAT, select="two_stage")
    assert both.residual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(both.residual.astype(jnp.float32), want)


def test_a_bias_is_added_once(made):
    _, x_both, kernel = made
    y = multiply(x_both, lambda rows: rows @ kernel, lambda rows: rows @ kernel + 3)
    np.testing.assert_allclose(y, product(x_both, kernel) + 3, rtol=1e-6, atol=1e-5)
