import jax.numpy as jnp
import numpy as np
import pytest

import sdq


def test_sqnr_by_the_definition(rng):
    x, noise = rng.standard_normal((2, 64, 64)).astype(np.float32)
    expected = 10 * np.log10(
        (x.astype(float) ** 2).sum() / ((0.01 * noise.astype(float)) ** 2).sum()
    )
    assert float(sdq.sqnr_db(jnp.asarray(x), jnp.asarray(x + 0.01 * noise))) == pytest.approx(
        expected, abs=1e-3
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sqnr_does_not_depend_on_scale(scale, rng):
    x = jnp.asarray(rng.standard_normal(4096), jnp.float32)
    y = x * 1.01
    assert float(sdq.sqnr_db(x * scale, y * scale)) == pytest.approx(40, abs=0.01)


def test_sqnr_at_the_edges():
    zero, one = jnp.zeros(3), jnp.ones(3)
    assert float(sdq.sqnr_db(one, one)) == np.inf
    assert float(sdq.sqnr_db(zero, zero)) == np.inf
    assert float(sdq.sqnr_db(zero, one)) == -np.inf
    for bad in (np.nan, np.inf):
        assert np.isnan(sdq.sqnr_db(one, one.at[0].set(bad)))
        assert np.isnan(sdq.sqnr_db(one.at[0].set(bad), one))
        assert np.isnan(sdq.sqnr_db(one.at[0].set(bad), one.at[0].set(bad)))


def test_sqnr_refuses_other_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        sdq.sqnr_db(jnp.ones(3), jnp.ones(4))
