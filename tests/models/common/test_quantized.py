import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from models.common.layers import Linear
from models.common.quantized import SiteRule, quantized_ops


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.randn(4, 64), jnp.float32)


def test_the_first_rule_that_matches_the_whole_site_wins(x):
    quantize = quantized_ops(
        [SiteRule("blocks/ffn/down", None), SiteRule("blocks/.*", "nvfp4")]
    ).quantize_input
    np.testing.assert_array_equal(quantize(x, "blocks/ffn/down"), x)
    np.testing.assert_array_equal(quantize(x, "head"), x)
    expected = sdq.dequantize(sdq.quantize(x, "nvfp4"))
    np.testing.assert_array_equal(quantize(x, "blocks/ffn/up"), expected)


@pytest.mark.parametrize("select", [None, "two_stage", "exhaustive"])
def test_blocks_choose_as_the_rule_says(x, select):
    ops = quantized_ops([SiteRule(".*", "sdq32:16", select)])
    expected = sdq.dequantize(sdq.quantize(x, "sdq32:16", select=select or "two_stage"))
    np.testing.assert_array_equal(ops.quantize_input(x, "anywhere"), expected)


def test_a_linear_sees_the_rounded_input(x, rng):
    params = {"kernel": jnp.asarray(rng.randn(64, 8), jnp.float32), "bias": jnp.zeros(8)}
    ops = quantized_ops([SiteRule(".*", "mxfp4")])
    y = Linear(8, ops).apply({"params": params}, ops.quantize_input(x, "site"))
    rounded = sdq.dequantize(sdq.quantize(x, "mxfp4"))
    np.testing.assert_allclose(y, rounded @ params["kernel"], rtol=1e-5)


def test_equal_rules_compile_once(x):
    traces = []

    def run(ops, x):
        traces.append(1)
        return ops.quantize_input(x, "site")

    jitted = jax.jit(run, static_argnums=0)
    for _ in range(2):
        jitted(quantized_ops([SiteRule(".*", "int8")]), x)
    assert len(traces) == 1


def test_a_wrong_rule_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="unknown format"):
        SiteRule(".*", "sdq33:16")
    with pytest.raises(ValueError, match="no regular expression"):
        SiteRule("(", "int8")
