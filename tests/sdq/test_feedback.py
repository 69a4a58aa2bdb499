import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdq import dequantize, quantize, validate
from sdq.feedback import refine

FORMATS = ("sdq32:16", "sdq32:64", "dialectfp4:32", "nvfp4", "mxfp4", "int4:32", "int4", "nf4:16")


def inputs(count, width, seed=0):
    """Correlated inputs `[count, width]` with unequal channels, as behind a norm or a GELU."""
    key_mix, key_x, key_scale = jax.random.split(jax.random.key(seed), 3)
    mix = jax.random.normal(key_mix, (width // 4, width))
    x = jax.random.normal(key_x, (count, width // 4)) @ mix + 0.3
    return x * jnp.exp(jax.random.normal(key_scale, (1, width)))


def second_moment(x):
    return x.T @ x / len(x)


def relative_error(x, w, q):
    y, z = (np.asarray(x, np.float64) @ np.asarray(m, np.float64) for m in (w, dequantize(q)))
    return np.sqrt(np.mean((y - z) ** 2) / np.mean(y**2))


@pytest.mark.parametrize("fmt", FORMATS)
def test_error_of_the_product_falls_by_half_on_new_inputs_of_the_kind(fmt):
    x = inputs(1024, 200)
    w = jax.random.normal(jax.random.key(1), (200, 24))
    q = quantize(w, fmt, axis=-2)
    refined = refine(q, w, second_moment(x[:512]))
    validate(refined)
    assert (refined.shape, refined.nbytes) == (q.shape, q.nbytes)
    assert relative_error(x[512:], w, refined) < 0.5 * relative_error(x[512:], w, q)


def test_independent_inputs_leave_nothing_to_make_up_for():
    w = jax.random.normal(jax.random.key(0), (96, 8))
    q = quantize(w, "sdq32:16", axis=-2)
    refined = refine(q, w, jnp.eye(96))
    np.testing.assert_array_equal(dequantize(refined), dequantize(q))


def test_equals_the_rule_written_out_in_float64():
    w = np.asarray(jax.random.normal(jax.random.key(2), (48, 3)), np.float64)
    moment = np.asarray(second_moment(inputs(256, 48)), np.float64)
    q = quantize(jnp.asarray(w, jnp.float32), "nvfp4", axis=-2)
    got = np.asarray(dequantize(refine(q, jnp.asarray(w, jnp.float32), jnp.asarray(moment))))

    damped = moment / (np.trace(moment) / 48) + 0.01 * np.eye(48)
    step = np.asarray(q.scales.T.view(jnp.float8_e4m3fn), np.float64) * float(q.outer[0, 0])
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for k in range(48):
        values = np.concatenate([grid, -grid]) * step[k // 16][:, None]
        value = values[np.arange(3), np.abs(w[k][:, None] - values).argmin(axis=1)]
        np.testing.assert_allclose(got[k], value, rtol=1e-5, err_msg=f"input {k}")
        # Where is the best for those that are left, given this one's error? A least-squares step.
        rest = np.linalg.solve(damped[k + 1 :, k + 1 :], damped[k + 1 :, k])
        w[k + 1 :] += np.outer(rest, w[k] - value)


def test_stacked_kernels_are_refined_one_by_one():
    x = jnp.stack([inputs(256, 64, seed) for seed in (0, 1)])
    w = jax.random.normal(jax.random.key(3), (2, 64, 16))
    q = quantize(w, "sdq32:16", axis=-2)
    moments = jax.vmap(second_moment)(x)
    both = dequantize(refine(q, w, moments))
    for i in range(2):
        alone = refine(quantize(w[i], "sdq32:16", axis=-2), w[i], moments[i])
        np.testing.assert_array_equal(both[i], dequantize(alone))


def test_inputs_that_are_never_seen_keep_the_nearest_values():
    w = jax.random.normal(jax.random.key(4), (64, 8))
    q = quantize(w, "sdq32:16", axis=-2)
    np.testing.assert_array_equal(dequantize(refine(q, w, jnp.zeros((64, 64)))), dequantize(q))


def test_a_bad_output_stays_bad_and_the_others_do_not_notice():
    x = inputs(256, 64)
    w = jax.random.normal(jax.random.key(5), (64, 4))
    bad = w.at[3, 2].set(jnp.nan)
    got = dequantize(refine(quantize(bad, "sdq32:16", axis=-2), bad, second_moment(x)))
    want = dequantize(refine(quantize(w, "sdq32:16", axis=-2), w, second_moment(x)))
    assert np.isnan(got[:, 2]).all()
    np.testing.assert_array_equal(np.delete(got, 2, 1), np.delete(want, 2, 1))


@pytest.mark.parametrize(
    ("fmt", "axis", "moment", "words"),
    [
        ("int8", -2, (64, 64), "4-bit codes along axis -2"),
        ("sdq32:16", -1, (64, 64), "4-bit codes along axis -2"),
        ("sdq32:16", -2, (8, 8), r"second_moment: expected shape \(64, 64\)"),
    ],
)
def test_bad_arguments_are_named(fmt, axis, moment, words):
    w = jnp.ones((64, 8))
    with pytest.raises(ValueError, match=words):
        refine(quantize(w, fmt, axis=axis), w, jnp.ones(moment))


@pytest.mark.parametrize("moment", [jnp.full((64, 64), jnp.nan), -jnp.eye(64)])
def test_a_moment_that_none_can_have_is_refused_and_changes_nothing_under_jit(moment):
    w = jax.random.normal(jax.random.key(6), (64, 8))
    q = quantize(w, "sdq32:16", axis=-2)
    with pytest.raises(ValueError, match="second_moment: not finite"):
        refine(q, w, moment)
    np.testing.assert_array_equal(jax.jit(refine)(q, w, moment).codes, q.codes)


def test_another_kernel_is_refused():
    with pytest.raises(ValueError, match="w: expected shape"):
        refine(quantize(jnp.ones((64, 8)), "nvfp4", axis=-2), jnp.ones((32, 8)), jnp.eye(64))
