"""The plain Ops and those on kernels compute the same; here their reference, in plain jnp."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.full_path import FullPath
from models.common.kernel_ops import (
    Products,
    on_kernels,
    prepared_attention,
    tile_kernels,
    without_kernels,
)
from models.common.layers import Ops
from models.common.quantizer import InputQuantizer, SiteRule
from models.common.semantic import Decomposition, SemanticDialect, Sharing
from models.wan.modeling import Wan
from models.wan.sites import video_inputs
from pallas_kernels import Fp8Rows, TiledWeight
from sdq import Rule, quantize, quantize_params, resolve
from tests.models.wan.test_modeling import TINY, inputs, random_params

RULES = (SiteRule(r"blocks/.*", "sdq32:16"),)
PLAIN = InputQuantizer(RULES)
FULL = SemanticDialect(
    rules=RULES,
    grid=(2, 2, 3),
    sites=video_inputs(TINY),
    sharing=Sharing(anchors=2, candidates=6, least=-2.0),
    decomposition=Decomposition(tokens=4, layers=(("blocks/ffn/down", (0,)),)),
    refresh_every=3,
)


@pytest.fixture(scope="module")
def quantised():
    params = random_params()
    plan = resolve([Rule(r"blocks/.*/kernel", "sdq32:16"), Rule(r".*", None)], params)
    return quantize_params(params, plan)


def run(params, quantizer, ops, steps=3):
    x, t, text, _ = inputs()
    model = Wan(TINY, ops, jnp.float32)

    @jax.jit
    def one(state, step):
        if state is None:
            return model.apply({"params": params}, x, t, text), None
        state = quantizer.at_step(state, step)
        return model.apply({"params": params}, x, t, text, state=state)

    state = quantizer.initial_state(TINY.layers, len(x))
    for step in range(steps):
        y, state = one(state, jnp.int32(step))
    return y


@pytest.mark.parametrize("quantizer", [PLAIN, FULL])
def test_the_same_video(quantised, quantizer):
    ops = Ops(quantizer=quantizer)
    plain, kernels = (run(quantised, quantizer, one) for one in (ops, on_kernels(ops)))
    exact = run(random_params(), Ops().quantizer, Ops(), steps=1)
    # A sum rounded otherwise may move a number over the edge of its bin.
    assert np.linalg.norm(plain - kernels) < np.linalg.norm(plain - exact) / 5


def test_kernels_are_reordered_once(quantised):
    tiled = tile_kernels(quantised)
    before, after = (tree["blocks"]["ffn"]["up"]["kernel"] for tree in (quantised, tiled))
    assert isinstance(after, TiledWeight) and after.shape == before.shape
    one = jax.tree.map(lambda part: part[1], after)
    assert one.shape == before.shape[1:] and one.groups.ndim == 3
    assert tiled["blocks"]["ffn"]["up"]["bias"] is quantised["blocks"]["ffn"]["up"]["bias"]
    embedder = quantize(jnp.ones((64, 32)), "int8", axis=0)
    assert tile_kernels({"kernel": embedder})["kernel"] is embedder


def test_what_comes_before_attention_is_a_kernel_s_unless_attention_does_it():
    assert on_kernels(Ops()).attention is prepared_attention
    assert on_kernels(Ops(attention=FullPath())).attention == FullPath()


def test_inputs_in_bf16_take_the_kernel_too(quantised):
    tiled = tile_kernels(quantised)["blocks"]["ffn"]["up"]["kernel"]
    one = jax.tree.map(lambda part: part[0], tiled)
    x = jnp.ones((2, tiled.shape[-2]), jnp.float32)
    assert on_kernels(Ops(), "fast").matmul == Products("fast") and isinstance(one, TiledWeight)
    with pytest.raises(ValueError, match="no implementation fits"):  # without a Hopper GPU
        Products()(x, one)


def test_the_mode_and_what_is_added_to_reach_the_kernel(quantised, monkeypatch):
    asked = []

    def product(x, kernel, *, mode, onto, **_):
        asked.append((mode, onto is not None))
        return jnp.ones((*x.shape[:-1], kernel.shape[-1]), x.dtype)

    monkeypatch.setattr("models.common.kernel_ops.quantized_matmul", product)
    for mode in ("fast", "accurate"):
        run(quantised, PLAIN, on_kernels(Ops(quantizer=PLAIN), mode), steps=1)
        assert set(asked) == {(mode, False), (mode, True)}
        asked.clear()
    with pytest.raises(ValueError, match="expected one of fast, accurate, got 'faster'"):
        on_kernels(Ops(), "faster")


def test_what_no_kernel_does_says_so(quantised):
    lut = dataclasses.replace(PLAIN, rules=(SiteRule("blocks/.*", "sdq32:16", "lut"),))
    with pytest.raises(ValueError, match="kernels choose in two stages, not by 'lut'"):
        on_kernels(Ops(quantizer=lut))
    rows = Fp8Rows(
        values=jnp.ones((1, 2, 32), jnp.float8_e4m3fn),
        exponents=jnp.zeros((1, 2, 1), jnp.int8),
        dtype=np.dtype(jnp.bfloat16),
    )
    with pytest.raises(ValueError, match="no kernel multiplies Fp8Rows"):
        Products()(rows, jnp.ones((32, 8)))
    ops = on_kernels(Ops(quantizer=InputQuantizer((SiteRule("blocks/.*", "int8"),))))
    with pytest.raises(ValueError, match="int8 numbers are not fp8 numbers"):
        run(quantised, ops.quantizer, ops, steps=1)


def test_why_there_are_no_kernels(quantised, monkeypatch):
    ops = Ops(quantizer=PLAIN)
    assert "needs" in without_kernels(ops, quantised)  # jax 0.11 or a Hopper GPU

    def in_block(fmt, width=64):
        made = quantize(jnp.ones((width, 32)), fmt, axis=0)
        embedder = quantize(jnp.ones((48, 32)), "int8", axis=0)
        return {"blocks": {"up": {"kernel": made}}, "time_in": {"kernel": embedder}}

    monkeypatch.setattr("pallas_kernels.device.without_mosaic_gpu", lambda: None)
    params = in_block("sdq32:16")
    assert without_kernels(ops, params) is None
    lut = dataclasses.replace(PLAIN, rules=(SiteRule("blocks/.*", "sdq32:16", "lut"),))
    assert "inputs chosen by lut" in without_kernels(Ops(quantizer=lut), params)
    int8 = InputQuantizer((SiteRule("blocks/.*", "int8"),))
    assert "inputs in int8" in without_kernels(Ops(quantizer=int8), params)
    params = in_block("nf4:64")
    assert "weights in nf4:64: only dialect formats" in without_kernels(ops, params)
    params = in_block("sdq32:16", 48)
    assert "weights of 48 channels: not a multiple of 32" in without_kernels(ops, params)
