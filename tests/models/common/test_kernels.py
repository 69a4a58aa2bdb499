import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common import kernels
from models.common.quantizer import SiteRule
from models.common.scan import InputStatistics
from sdq import dequantize, quantize
from sdq.rotate import hadamard

SITES = {"blocks/up": ("up",), "blocks/qkv": ("attn/q", "attn/k")}
ROTATED = (SiteRule("blocks/up", "int4:32", rotate=True), SiteRule(".*", "int4:32"))


@pytest.fixture
def blocks(rng):
    """Two blocks with three linears."""

    def linear():
        return {"kernel": jnp.asarray(rng.randn(2, 64, 8), jnp.float32), "bias": jnp.ones((2, 8))}

    return {"up": linear(), "attn": {"q": linear(), "k": linear()}}


@pytest.fixture
def x(rng):
    """Correlated inputs `[blocks, B, S, K]`."""
    return jnp.asarray(rng.randn(2, 4, 64, 6) @ rng.randn(6, 64), jnp.float32)


def test_rotated_kernels_and_inputs_have_the_same_product(blocks, x):
    turned = kernels.rotate(blocks, SITES, ROTATED)
    product = jnp.einsum("lbsk,lkn->lbsn", x, blocks["up"]["kernel"])
    got = jnp.einsum("lbsk,lkn->lbsn", hadamard(x, 64), turned["up"]["kernel"])
    np.testing.assert_allclose(got, product, atol=1e-3)
    assert not np.allclose(turned["up"]["kernel"], blocks["up"]["kernel"], atol=0.1)
    np.testing.assert_array_equal(turned["attn"]["q"]["kernel"], blocks["attn"]["q"]["kernel"])
    np.testing.assert_array_equal(turned["up"]["bias"], blocks["up"]["bias"])


@pytest.mark.parametrize("rules", [ROTATED, ()])
def test_feedback_lowers_the_error_of_every_product(blocks, x, rules):
    moment = jnp.einsum("lbsi,lbsj->lij", x, x) / 256
    of = InputStatistics(moment, jnp.abs(x).max(axis=(1, 2)))
    turned = kernels.rotate(blocks, SITES, rules)
    plain = jax.tree.map(lambda w: quantize(w, "int4:32", axis=-2) if w.ndim == 3 else w, turned)
    better = kernels.feed_back(plain, turned, dict.fromkeys(SITES, of), SITES, rules)

    def error(got, linear, x):
        w = turned[linear] if linear == "up" else turned["attn"][linear]
        q = got[linear] if linear == "up" else got["attn"][linear]
        left = dequantize(q["kernel"]) - w["kernel"]
        return float(jnp.square(jnp.einsum("lbsk,lkn->lbsn", x, left)).sum())

    for linear in ("up", "q", "k"):
        seen = hadamard(x, 64) if linear == "up" and rules else x
        assert error(better, linear, seen) < 0.5 * error(plain, linear, seen)


def test_eight_bits_and_kept_kernels_stay(blocks):
    up = blocks["up"] | {"kernel": quantize(blocks["up"]["kernel"], "int8", axis=-2)}
    quantised = blocks | {"up": up}
    of = InputStatistics(jnp.broadcast_to(jnp.eye(64), (2, 64, 64)), jnp.ones((2, 64)))
    same = kernels.feed_back(quantised, blocks, dict.fromkeys(SITES, of), SITES, ())
    jax.tree.map(np.testing.assert_array_equal, same, quantised)
