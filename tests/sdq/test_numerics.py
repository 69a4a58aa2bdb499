import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdq import numerics


def test_exponent_of_every_power_and_its_neighbours():
    n = np.arange(-126, 128)
    power = np.ldexp(np.float32(1), n).astype(np.float32)
    np.testing.assert_array_equal(numerics.exponent_of(jnp.asarray(power)), n)
    below = np.nextafter(power[1:], np.float32(0))
    np.testing.assert_array_equal(numerics.exponent_of(jnp.asarray(below)), n[1:] - 1)
    np.testing.assert_array_equal(numerics.exponent_of(jnp.asarray(-power)), n)


def test_exponent_of_the_special_values():
    x = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan])
    z, bad = numerics.ZERO_EXPONENT, numerics.NON_FINITE
    assert numerics.exponent_of(x).tolist() == [z, z, bad, bad, bad]


def test_power_of_two_is_exact_over_its_range():
    n = np.arange(-126, 128, dtype=np.int32)
    np.testing.assert_array_equal(numerics.power_of_two(jnp.asarray(n)), np.ldexp(np.float32(1), n))


@pytest.mark.parametrize(
    ("x", "n"), [(1.5, 127), (1.5e38, -250), (1.5e-38, 250), (3.0, -126), (-5.0, 0)]
)
def test_times_power_of_two_where_one_factor_would_not_do(x, n):
    got = numerics.times_power_of_two(jnp.array([x], jnp.float32), jnp.array([n], jnp.int32))
    assert float(got[0]) == float(np.ldexp(np.float64(np.float32(x)), n))


@pytest.mark.parametrize("divisor", [6, 7, 127, 2688])
def test_divided_by_is_correctly_rounded(divisor, rng):
    mantissas = rng.randint(0, 1 << 23, 100_000) | (rng.randint(20, 250, 100_000) << 23)
    x = np.concatenate([mantissas.astype(np.int32).view(np.float32), [0, 3.4e38, divisor, 1]])
    x = x.astype(np.float32)
    got = jax.jit(lambda x: numerics.divided_by(x, divisor))(jnp.asarray(x))
    np.testing.assert_array_equal(got, x / np.float32(divisor))


@pytest.mark.parametrize("divisor", [0, -6, 8, 129])
def test_divided_by_refuses_what_it_cannot_do_exactly(divisor):
    with pytest.raises(ValueError, match=r"divisor: expected 2\^n times an odd number"):
        numerics.divided_by(jnp.ones(3), divisor)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("length", [1, 16, 50, 64, 4096])
def test_largest_magnitude_lets_nothing_bad_slip(bad, length, rng):
    x = rng.standard_normal((3, length)).astype(np.float32)
    x[1, rng.randint(length)] = bad
    got = np.asarray(numerics.largest_magnitude(jnp.asarray(x)))
    assert not np.isfinite(got[1])
    np.testing.assert_array_equal(got[[0, 2]], np.abs(x[[0, 2]]).max(axis=1))
    assert numerics.row_is_bad(jnp.asarray(got)).tolist() == [True]


def test_subnormals_become_zeros_of_their_sign():
    x = np.array([2.0**-127, -(2.0**-149), 2.0**-126, -1.0, np.nan, np.inf, -0.0], np.float32)
    got = np.asarray(numerics.without_subnormals(jnp.asarray(x)))
    expected = np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype(np.float32)
    np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))
