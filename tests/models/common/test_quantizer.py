import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from models.common.layers import Linear, Ops
from models.common.quantizer import InputQuantizer, SiteRule, misfits
from sdq.rotate import hadamard


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.randn(4, 64), jnp.float32)


def test_the_first_rule_that_matches_the_whole_site_wins(x):
    rules = SiteRule("blocks/ffn/down", None), SiteRule("blocks/.*", "nvfp4")

    def quantize(x, site):
        return InputQuantizer(rules).quantize(x, site, None)

    np.testing.assert_array_equal(quantize(x, "blocks/ffn/down"), x)
    np.testing.assert_array_equal(quantize(x, "head"), x)
    expected = sdq.dequantize(sdq.quantize(x, "nvfp4"))
    np.testing.assert_array_equal(quantize(x, "blocks/ffn/up"), expected)


@pytest.mark.parametrize("select", [None, "two_stage", "exhaustive"])
def test_blocks_choose_as_the_rule_says(x, select):
    quantizer = InputQuantizer((SiteRule(".*", "sdq32:16", select),))
    expected = sdq.dequantize(sdq.quantize(x, "sdq32:16", select=select or "two_stage"))
    np.testing.assert_array_equal(quantizer.quantize(x, "anywhere", None), expected)


def test_a_linear_sees_the_rounded_input(x, rng):
    params = {"kernel": jnp.asarray(rng.randn(64, 8), jnp.float32), "bias": jnp.zeros(8)}
    quantizer = InputQuantizer((SiteRule(".*", "mxfp4"),))
    y = Linear(8, Ops()).apply({"params": params}, quantizer.quantize(x, "site", None))
    rounded = sdq.dequantize(sdq.quantize(x, "mxfp4"))
    np.testing.assert_allclose(y, rounded @ params["kernel"], rtol=1e-5)


def test_equal_rules_compile_once(x):
    traces = []

    def run(ops, x):
        traces.append(1)
        return ops.quantizer.quantize(x, "site", None)

    jitted = jax.jit(run, static_argnums=0)
    for _ in range(2):
        jitted(Ops(quantizer=InputQuantizer((SiteRule(".*", "int8"),))), x)
    assert len(traces) == 1


def test_a_wrong_rule_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="unknown format"):
        SiteRule(".*", "sdq33:16")
    with pytest.raises(ValueError, match="no regular expression"):
        SiteRule("(", "int8")


def test_a_rotating_rule_rounds_the_rotated_input(x):
    quantizer = InputQuantizer((SiteRule(".*", "int4:32", rotate=True),))
    expected = sdq.fake_quantize(hadamard(x, 64), "int4:32")
    np.testing.assert_array_equal(quantizer.quantize(x, "anywhere", None), expected)


def test_rules_that_decide_nothing_are_named():
    sites = ["blocks/ffn/up", "blocks/ffn/down"]
    rules = SiteRule("blocks/.*", "int8"), SiteRule("blocks/ffn/up", None), SiteRule("head", "int8")
    first, second = misfits(rules, sites)
    assert "input rule 1 'blocks/ffn/up' decides about none of blocks/ffn/up" in first
    assert "input rule 2 'head'" in second
    assert misfits(rules[:1], sites) == []
