import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantized_attention
from pallas_kernels.mosaic_gpu.attention_operands import rounded

B, S, L, H, D = 2, 33, 700, 3, 128


@pytest.fixture
def operands(rng):
    q = jnp.asarray(rng.randn(B, S, H, D), jnp.float32)
    return q, *(jnp.asarray(rng.randn(B, L, H, D), jnp.float32) for _ in range(2))


def numbers(x):
    return np.asarray(x.values, np.float64) * np.asarray(x.scales, np.float64)


def exact(q, k, v, mask=None, scale=D**-0.5):
    """Of rounded operands, in float64: `[B, S, H, D]`."""
    q, k, v = map(numbers, (q, k, v))
    scores = np.einsum("bhsd,bhld->bhsl", q, k) * scale
    if mask is not None:
        scores = np.where(np.asarray(mask)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhsl,bhdl->bshd", weights, v)


def relative(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    "formats", [("sdq32:16", "sdq32:32"), ("dialectfp4:16", None), (None, None)]
)
def test_the_reference_is_attention_of_the_rounded_numbers(operands, formats):
    y = quantized_attention(
        *operands, fmt_qk=formats[0], fmt_pv=formats[1], implementation="reference"
    )
    assert y.shape == (B, S, H, D) and y.dtype == jnp.float32
    assert relative(y, exact(*rounded(*operands, *formats))) < 1e-5


def test_rounding_costs_what_the_formats_cost(operands):
    """Decibels against attention that rounds nothing; scores spread by 1."""
    q, k, v = operands
    plain = jax.nn.dot_product_attention(q, k, v)
    for formats, least in (
        (("sdq32:16", "sdq32:16"), 17),
        ((None, "sdq32:16"), 19),
        ((None, None), 26),
    ):
        y = quantized_attention(q, k, v, fmt_qk=formats[0], fmt_pv=formats[1])
        assert -20 * np.log10(relative(y, np.asarray(plain, np.float64))) > least


def test_keys_that_do_not_count_change_nothing(operands, rng):
    """Not even by being large, or NaN."""
    q, k, v = operands
    mask = jnp.asarray(rng.rand(B, L) < 0.7)
    spoilt = [jnp.where(mask[:, :, None, None], x, bad) for x, bad in ((k, 1e4), (v, jnp.nan))]
    formats = {"fmt_qk": None, "fmt_pv": None, "implementation": "reference"}
    y = quantized_attention(q, *spoilt, mask=mask, **formats)
    for b in range(B):
        left = [x[b : b + 1, np.asarray(mask[b])] for x in (k, v)]
        alone = quantized_attention(q[b : b + 1], *left, **formats)
        np.testing.assert_allclose(y[b : b + 1], alone, atol=1e-6)


def test_without_any_key_there_is_nothing(operands):
    mask = jnp.ones((B, L), bool).at[1].set(False)
    y = quantized_attention(*operands, mask=mask, implementation="reference")
    assert not np.asarray(y[1]).any() and np.asarray(y[0]).any()


@pytest.mark.parametrize("fmt", ["sdq32:16", None])
def test_a_nan_poisons_its_head_and_no_other(operands, fmt):
    q, k, v = operands
    formats = {"fmt_qk": fmt, "fmt_pv": fmt, "implementation": "reference"}
    y = np.asarray(quantized_attention(q, k.at[1, 5, 2, 7].set(jnp.nan), v, **formats))
    bad = np.zeros((B, H), bool)
    bad[1, 2] = True
    np.testing.assert_array_equal(np.isnan(y).any(axis=(1, 3)), bad)
    assert np.isnan(y[1, :, 2]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fmt_qk": "nvfp4"}, "fmt_qk: expected a dialect format or None, got 'nvfp4'"),
        ({"v": jnp.ones((B, L, H, 64))}, r"v: expected \[2, 700, 3, 128\], got \[2, 700, 3, 64\]"),
        ({"q": jnp.ones((S, H, D))}, r"q: expected \[B, S, H, D\], got \[33, 3, 128\]"),
        ({"mask": jnp.ones((B, S), bool)}, r"mask: expected bool\[2, 700\], got bool\[2, 33\]"),
        ({"implementation": "flash"}, "expected one of mosaic_gpu, reference, got 'flash'"),
        ({"implementation": "mosaic_gpu"}, "mosaic_gpu cannot do this: needs"),
    ],
)
def test_wrong_operands_say_so(operands, change, message):
    arguments = dict(zip("qkv", operands, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        quantized_attention(**arguments)
