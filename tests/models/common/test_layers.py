import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sdq
from models.common.layers import (
    AffineLayerNorm,
    Heads,
    Linear,
    Ops,
    matmul,
    modulated_norm,
    patchify,
    sinusoid,
    stack,
    unpatchify,
)
from pallas_kernels import Onto, computed, prepared
from sdq.decompose import Decomposed


@pytest.fixture
def linear(rng):
    kernel = jnp.asarray(rng.randn(32, 8), jnp.float32)
    return {"kernel": kernel, "bias": jnp.asarray(rng.randn(8), jnp.float32)}


def test_linear_accepts_an_array_or_a_qtensor(rng, linear):
    x = jnp.asarray(rng.randn(2, 3, 32), jnp.float32)
    layer = Linear(8, Ops())
    y = layer.apply({"params": linear}, x)
    np.testing.assert_allclose(y, x @ linear["kernel"] + linear["bias"][None, None], rtol=1e-5)
    q = sdq.quantize(linear["kernel"], "sdq32:16", axis=-2)
    expected = layer.apply({"params": {**linear, "kernel": sdq.dequantize(q)}}, x)
    np.testing.assert_array_equal(layer.apply({"params": {**linear, "kernel": q}}, x), expected)


def test_matmul_accepts_a_quantised_input(rng, linear):
    x = jnp.asarray(rng.randn(5, 32), jnp.float32)
    q = sdq.quantize(x, "sdq32:16")
    np.testing.assert_array_equal(
        matmul(q, linear["kernel"]), matmul(sdq.dequantize(q), linear["kernel"])
    )


def test_linear_refuses_a_kernel_of_another_shape(linear):
    with pytest.raises(ValueError, match=r"kernel: expected shape \[16, 8\], got \[32, 8\]"):
        Linear(8, Ops()).apply({"params": linear}, jnp.ones((1, 16)))


def test_the_matmul_is_an_argument(linear):
    seen = []

    def spy(x, kernel, *, bias, activation, onto):
        seen.append((x.shape, kernel.shape, bias.shape, activation))
        return matmul(x, kernel, bias=bias, activation=activation, onto=onto)

    x = jnp.ones((4, 32))
    y = Linear(8, Ops(matmul=spy)).apply({"params": linear}, x)
    h = Linear(8, Ops(matmul=spy), activation="gelu").apply({"params": linear}, x)
    shapes = (4, 32), (32, 8), (8,)
    assert seen == [(*shapes, None), (*shapes, "gelu")]
    np.testing.assert_array_equal(h, jax.nn.gelu(y, approximate=True))


@pytest.mark.parametrize("gates", [None, (1, 1, 8), (2, 1, 8), (2, 5, 8)])
@pytest.mark.parametrize("active", [None, True, False])
def test_a_linear_adds_to_something(rng, linear, gates, active):
    """The same numbers as adding afterwards, of decomposed inputs too."""
    there = jnp.asarray(rng.randn(2, 5, 8), jnp.float32)
    gate = None if gates is None else jnp.asarray(rng.randn(*gates), jnp.float32)
    onto = Onto(x=there, gate=gate)
    base, residual = (jnp.asarray(rng.randn(2, n, 32), jnp.float32) for n in (5, 2))
    tokens = jnp.asarray([[0, 3], [4, 1]])
    on = None if active is None else jnp.asarray(active)
    x = Decomposed(base=base, residual=residual, tokens=tokens, active=on)
    layer = Linear(8, Ops())
    for given in (base, x):
        expected = onto.plus(layer.apply({"params": linear}, given))
        got = layer.apply({"params": linear}, given, onto)
        few_roundings = 4 * 2**-23 * abs(expected).max()  # in another order
        np.testing.assert_allclose(got, expected, rtol=0, atol=few_roundings)
    gelu = Linear(8, Ops(), activation="gelu")
    expected = onto.plus(gelu.apply({"params": linear}, x))
    np.testing.assert_array_equal(gelu.apply({"params": linear}, x, onto), expected)


def test_bfloat16_products_are_summed_in_float32():
    k = 4096
    x, kernel = jnp.ones((1, k), jnp.bfloat16), jnp.full((k, 1), 1 + 2**-7, jnp.bfloat16)
    y = matmul(x, kernel, bias=jnp.ones(1))
    assert y.dtype == jnp.bfloat16 and float(y[0, 0]) == 4128  # 4129 to 8 bits


def test_layer_norm_equals_float64(rng):
    x = 100 * rng.randn(1, 3, 64) + 5
    scale, bias = rng.randn(64), rng.randn(64)
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * scale + bias
    norm = AffineLayerNorm(1e-6)
    params = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    y = computed(norm.apply({"params": params}, jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    narrow = computed(norm.apply({"params": params}, jnp.asarray(x, jnp.bfloat16)))
    assert narrow.dtype == jnp.bfloat16


@pytest.mark.parametrize("alone, gains", [(False, 12), (True, 4)])
def test_heads_are_normed_together_or_alone(rng, alone, gains):
    x = jnp.asarray(rng.randn(2, 5, 12), jnp.float32)
    heads = Heads(3, 1e-6, alone=alone)
    params = heads.init(jax.random.key(0), x)
    assert params["params"]["scale"].shape == (gains,)
    found = prepared(heads.apply(params, x))
    assert found.shape == (2, 5, 3, 4)
    over = (-1,) if alone else (-2, -1)
    np.testing.assert_allclose(jnp.square(found).mean(axis=over), 1, rtol=1e-4)


def test_modulation_broadcasts_over_tokens_or_follows_them(rng):
    x = jnp.asarray(rng.randn(2, 5, 16), jnp.float32)
    shift, scale = (jnp.asarray(rng.randn(2, 1, 16), jnp.float32) for _ in range(2))
    one = computed(modulated_norm(x, shift, scale, 1e-6))
    each = computed(modulated_norm(x, jnp.repeat(shift, 5, 1), jnp.repeat(scale, 5, 1), 1e-6))
    np.testing.assert_array_equal(one, each)


def test_sinusoid_puts_cosines_first():
    out = sinusoid(jnp.asarray([0.0, 3.0]), 4)
    np.testing.assert_allclose(out[0], [1, 1, 0, 0])
    expected = [np.cos(3), np.cos(0.03), np.sin(3), np.sin(0.03)]
    np.testing.assert_allclose(out[1], expected, rtol=1e-5)


def test_patches_and_back(rng):
    x = jnp.asarray(rng.randn(2, 4, 6, 8, 3), jnp.float32)
    tokens = patchify(x, (2, 3, 2))
    assert tokens.shape == (2, 2 * 2 * 4, 2 * 3 * 2 * 3)
    np.testing.assert_array_equal(tokens[0, 1], x[0, :2, :3, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(tokens, (4, 6, 8), (2, 3, 2)), x)


def test_patch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"a patch of \[2, 2, 2\] does not divide \[3, 4, 4\]"):
        patchify(jnp.ones((1, 3, 4, 4, 1)), (2, 2, 2))


def test_blocks_are_traced_once_and_may_call_back():
    traced, seen = [], []

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, shift, _):
            traced.append(1)
            x = x * self.param("scale", nn.initializers.ones, ()) + shift
            jax.debug.callback(lambda value: seen.append(float(value)), x, ordered=True)
            return x, None

    blocks = stack(Block, 3, shared=1)()
    params = {"params": {"scale": jnp.full(3, 2.0)}}
    y, _ = jax.jit(blocks.apply)(params, jnp.float32(1), jnp.float32(1), None)
    jax.effects_barrier()
    assert len(traced) == 1 and seen == [3, 7, 15] and y == 15
