import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Projected, prepared, quantized_attention
from pallas_kernels.mosaic_gpu.attention_operands import rounded

B, S, L, H, D = 2, 33, 700, 3, 128
SDQ = "sdq32:16"


@pytest.fixture
def operands(rng):
    q = jnp.asarray(rng.randn(B, S, H, D), jnp.float32)
    return q, *(jnp.asarray(rng.randn(B, L, H, D), jnp.float32) for _ in range(2))


def numbers(x):
    return np.asarray(x.values, np.float64) * np.asarray(x.scales, np.float64)


def exact(q, k, v, mask=None, scale=D**-0.5, causal=None):
    """Of rounded operands, in float64: `[B, S, H, D]`."""
    q, k, v = map(numbers, (q, k, v))
    scores = np.einsum("bhsd,bhld->bhsl", q, k) * scale
    if causal is not None:
        block = np.arange(scores.shape[-1]) // causal
        scores = np.where(block[:, None] >= block, scores, -np.inf)
    if mask is not None:
        scores = np.where(np.asarray(mask)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhsl,bhdl->bshd", weights, v)


def relative(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("formats", [(SDQ, "sdq32:32"), ("dialectfp4:16", None), (None, None)])
def test_the_reference_is_attention_of_the_rounded_numbers(operands, formats):
    formats = {"fmt_qk": formats[0], "fmt_pv": formats[1]}
    y = quantized_attention(*operands, **formats, center=False, implementation="reference")
    assert y.shape == (B, S, H, D) and y.dtype == jnp.float32
    assert relative(y, exact(*rounded(*operands, **formats))) < 1e-5


@pytest.mark.parametrize("width", [64, 80])
def test_plain_differs_by_the_rounding_of_weights(rng, width):
    """Three per cent of each, not of their sum; padded and masked keys, and a query of its own."""
    q, k, v = (jnp.asarray(rng.randn(B, n, H, width), jnp.float32) for n in (S, L, L))
    mask = jnp.asarray(rng.rand(B, L) < 0.7)
    v = v + 1
    y, expected = (
        quantized_attention(q, k, v, mask=mask, implementation=name)
        for name in ("plain", "reference")
    )
    assert 1e-3 < relative(y, np.asarray(expected)) < 1e-2
    alone = quantized_attention(q[:, 5:6], k, v, mask=mask, implementation="plain")
    np.testing.assert_allclose(alone, y[:, 5:6], rtol=1e-6)


def test_rounding_costs_what_the_formats_cost(operands):
    """Decibels against attention that rounds nothing; scores spread by 1."""
    q, k, v = operands
    plain = jax.nn.dot_product_attention(q, k, v)
    for formats, least in (
        ((SDQ, SDQ), 17),
        ((None, SDQ), 19),
        ((None, None), 26),
    ):
        y = quantized_attention(q, k, v, fmt_qk=formats[0], fmt_pv=formats[1])
        assert -20 * np.log10(relative(y, np.asarray(plain, np.float64))) > least


@pytest.mark.parametrize("options", [{}, {"rotate": True}])
def test_what_is_done_before_rounding_changes_nothing_else(operands, options):
    """Keys with a large mean and a loud channel: what helps, helps, and what is exact is exact."""
    q, k, v = operands
    k = (k + 4 * k[:, :1]).at[..., 3].multiply(8)
    q = q.at[..., 3].multiply(1 / 8)
    plain = np.asarray(jax.nn.dot_product_attention(q, k, v), np.float64)

    def error(**options):
        return relative(quantized_attention(q, k, v, implementation="reference", **options), plain)

    assert error(**options) < 0.2
    assert error(fmt_qk=SDQ, **options) < 0.7 * error(fmt_qk=SDQ, center=False)


def test_projected_queries_and_keys_are_prepared_first(rng):
    """In float32, whatever they are stored in."""
    angles = 6 * rng.rand(L, 32)
    rope = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    gain = jnp.asarray(1 + rng.rand(H * 64), jnp.float32)
    x = (jnp.asarray(3 * rng.randn(B, L, H * 64), jnp.bfloat16) for _ in "qk")
    q, k = (Projected(x=each, gain=gain, rope=rope, heads=H, eps=1e-6) for each in x)
    v = jnp.asarray(rng.randn(B, L, H, 64), jnp.bfloat16)
    y = quantized_attention(q, k, v, rotate=True, implementation="plain")
    assert y.shape == v.shape and y.dtype == jnp.bfloat16
    given = [prepared(x, jnp.float32) for x in (q, k)]
    np.testing.assert_allclose(given[0][1, 7], turned(q, 1, 7), rtol=1e-5, atol=1e-5)
    same = quantized_attention(*given, v, rotate=True, implementation="plain")
    np.testing.assert_array_equal(y, same.astype(jnp.bfloat16))


def turned(x, video, token):
    """Norm and rotary embedding of a token, by their definitions."""
    y = np.asarray(x.x[video, token], np.float64)
    y = y / np.sqrt(np.mean(y**2) + x.eps) * np.asarray(x.gain, np.float64)
    cos, sin = (np.asarray(each[token], np.float64) for each in x.rope)
    pairs = y.reshape(H, -1, 2) @ [1, 1j] * (cos + 1j * sin)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(H, -1)


def test_keys_that_do_not_count_change_nothing(operands, rng):
    """Not even by being large, or NaN."""
    q, k, v = operands
    mask = jnp.asarray(rng.rand(B, L) < 0.7)
    spoilt = [jnp.where(mask[:, :, None, None], x, bad) for x, bad in ((k, 1e4), (v, jnp.nan))]
    plain = {"implementation": "reference"}
    y = quantized_attention(q, *spoilt, mask=mask, **plain)
    for b in range(B):
        left = [x[b : b + 1, np.asarray(mask[b])] for x in (k, v)]
        alone = quantized_attention(q[b : b + 1], *left, **plain)
        np.testing.assert_allclose(y[b : b + 1], alone, atol=1e-6)


@pytest.mark.parametrize("causal", [37, 130, 256, 300, 1000])
def test_tokens_see_their_block_and_those_before(rng, causal):
    """Whatever it is: less than a tile, no multiple of one, all tokens, more."""
    x = [jnp.asarray(rng.randn(B, 300, H, 64), jnp.float32) for _ in range(3)]
    x[2] = x[2] + 1
    y, plain = (
        quantized_attention(*x, causal=causal, center=False, implementation=name)
        for name in ("reference", "plain")
    )
    expected = exact(*rounded(*x, None, None), scale=64**-0.5, causal=causal)
    assert relative(y, expected) < 1e-5
    assert relative(plain, np.asarray(y)) < 2e-2  # few keys, each weight 3 % off


def test_later_blocks_change_nothing_but_exponents(rng):
    """And masked keys stay masked."""
    q, k, v = (jnp.asarray(rng.randn(B, 300, H, 64), jnp.float32) for _ in range(3))
    mask = jnp.asarray(rng.rand(B, 300) < 0.7).at[:, 0].set(True)
    see = {"mask": mask, "causal": 100, "implementation": "plain"}
    y = quantized_attention(q, k, v, **see)
    later = jnp.arange(300)[:, None, None] >= 200
    k, v = (jnp.where(later, x[:, ::-1], x) for x in (k, v))  # of the same size
    mixed = quantized_attention(q, k, v, center=False, **see)
    again = quantized_attention(
        q, k, v, center=False, **(see | {"mask": mask.at[:, 200:].set(False)})
    )
    np.testing.assert_allclose(mixed[:, :200], again[:, :200], rtol=1e-6)
    assert relative(y[:, :200], np.asarray(mixed[:, :200])) < 0.05


def test_without_any_key_there_is_nothing(operands):
    mask = jnp.ones((B, L), bool).at[1].set(False)
    y = quantized_attention(*operands, mask=mask, implementation="reference")
    assert not np.asarray(y[1]).any() and np.asarray(y[0]).any()


@pytest.mark.parametrize("fmt", [SDQ, None])
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
        (
            {"k": jnp.ones((B, 0, H, D)), "v": jnp.ones((B, 0, H, D))},
            "k: expected at least one key",
        ),
        ({"causal": 16}, "causal: expected as many keys as queries, 33, got 700"),
        ({"causal": 0}, "causal: expected at least one token in a block, got 0"),
        ({"scale": -1.0}, "scale: expected more than 0, got -1.0"),
        ({"implementation": "flash"}, "expected one of mosaic_gpu, reference, plain, got 'flash'"),
        ({"implementation": "mosaic_gpu"}, "mosaic_gpu cannot do this: needs"),
    ],
)
def test_wrong_operands_say_so(operands, change, message):
    arguments = dict(zip("qkv", operands, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        quantized_attention(**arguments)
