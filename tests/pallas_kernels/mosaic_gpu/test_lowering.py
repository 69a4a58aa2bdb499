"""Calls that only a Hopper GPU runs, lowered for one: shapes fit from arguments to results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from pallas_kernels import (
    Activated,
    Concatenated,
    Normed,
    Onto,
    Projected,
    Quantized,
    prepare_heads,
    quantize_rows,
    quantized_attention,
    quantized_matmul,
    tile_weight,
    which,
)

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11")


def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture
def hopper():
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def test_from_activations_to_a_product(hopper):
    """Two videos of 100 tokens, K = 608, sub-formatbooks by block, 10 residuals; N = 200."""
    q = jax.eval_shape(lambda w: sdq.quantize(w, "sdq32:16"), abstract((200, 608), jnp.float32))

    def call(x, books, group, tokens, w):
        found = quantize_rows(x, "sdq32:16", sub_formatbooks=(books, group), tokens=tokens)
        assert which(found.rows, w).implementation == "mosaic_gpu"
        products = [quantized_matmul(rows, w) for rows in found]
        return found, products

    arguments = (
        abstract((2, 100, 608), jnp.bfloat16),
        abstract((2, 5, 38, 8), jnp.uint8),
        abstract((2, 100), jnp.int32),
        abstract((2, 10), jnp.int32),
        jax.eval_shape(tile_weight, q),
    )
    found, products = jax.eval_shape(call, *arguments)
    assert isinstance(found, Quantized)
    assert [rows.shape for rows in found] == [(2, 100, 608), (2, 10, 608)]
    assert [rows.exponents.shape for rows in found] == [(2, 100, 1), (2, 10, 1)]
    assert [(y.shape, y.dtype) for y in products] == [
        ((2, 100, 200), np.dtype(jnp.bfloat16)),
        ((2, 10, 200), np.dtype(jnp.bfloat16)),
    ]
    exported = jax.export.export(jax.jit(call), platforms=["cuda"])(*arguments)
    assert exported.mlir_module().count("mosaic_gpu_v2") >= 3


@pytest.mark.parametrize(
    "gain, kernels_norm", [((2, 1, 608), True), ((1, 1, 608), True), ((2, 100, 608), False)]
)
def test_a_norm_of_videos_is_done_on_the_way(hopper, gain, kernels_norm):
    """One of each token is not: the kernel takes x after it."""

    def call(x, gain, shift):
        return quantize_rows(Normed(x=x, gain=gain, shift=shift, eps=1e-6), "sdq32:16")

    arguments = (abstract((2, 100, 608), jnp.bfloat16), *[abstract(gain, jnp.float32)] * 2)
    text = jax.export.export(jax.jit(call), platforms=["cuda"])(*arguments).mlir_module()
    assert text.count("mosaic_gpu_v2") == 1
    assert ("stablehlo.rsqrt" in text) != kernels_norm


def test_a_gelu_is_done_on_the_way(hopper):
    def call(x):
        return quantize_rows(Activated(x=x, activation="gelu"), "sdq32:16")

    x = abstract((2, 100, 608), jnp.bfloat16)
    text = jax.export.export(jax.jit(call), platforms=["cuda"])(x).mlir_module()
    assert text.count("mosaic_gpu_v2") == 1 and "stablehlo.tanh" not in text


def test_two_arrays_are_rounded_where_they_are(hopper):
    def call(x, more):
        return quantize_rows(Concatenated(x=x, more=more), "sdq32:16")

    x, more = (abstract((2, 100, width), jnp.bfloat16) for width in (96, 512))
    text = jax.export.export(jax.jit(call), platforms=["cuda"])(x, more).mlir_module()
    assert text.count("mosaic_gpu_v2") == 1 and "stablehlo.concatenate" not in text


@pytest.mark.parametrize(
    "gate, together",
    [(None, True), ((1, 1, 200), True), ((2, 1, 200), False), ((2, 100, 200), False)],
)
def test_a_result_is_added_where_it_is_made(hopper, gate, together):
    """And takes the place of what it is added to; unless rows have gates of their own: XLA adds."""
    q = jax.eval_shape(lambda w: sdq.quantize(w, "sdq32:16"), abstract((200, 608), jnp.float32))
    w = jax.eval_shape(tile_weight, q)

    def call(x, w, onto):
        return quantized_matmul(x, w, onto=onto)

    there = abstract((2, 100, 200), jnp.bfloat16)
    onto = Onto(x=there, gate=None if gate is None else abstract(gate, jnp.float32))
    arguments = abstract((2, 100, 608), jnp.bfloat16), w, onto
    y = jax.eval_shape(call, *arguments)
    assert y.shape == there.shape and y.dtype == there.dtype
    text = jax.export.export(jax.jit(call), platforms=["cuda"])(*arguments).mlir_module()
    assert text.count("mosaic_gpu_v2") == 1 and ("stablehlo.add" in text) != together
    assert ("output_operand_alias" in text) == together


def test_attention_reads_linears_results(hopper):
    """Three kernels for queries and keys, one for values, and attention; nothing normed by XLA."""

    def call(q, k, v, gain, rope):
        q, k = (Projected(x=x, gain=gain, rope=rope, heads=3, eps=1e-6) for x in (q, k))
        return quantized_attention(q, k, v, rotate=True, center=False)

    rows, angles = abstract((2, 333, 384), jnp.bfloat16), abstract((333, 64), jnp.float32)
    heads = abstract((2, 333, 3, 128), jnp.bfloat16)
    arguments = rows, rows, heads, abstract((384,), jnp.bfloat16), (angles, angles)
    y = jax.eval_shape(call, *arguments)
    assert y.shape == heads.shape and y.dtype == jnp.bfloat16
    text = jax.export.export(jax.jit(call), platforms=["cuda"])(*arguments).mlir_module()
    assert text.count("mosaic_gpu_v2") == 5 and "stablehlo.rsqrt" not in text


def test_heads_are_prepared_in_one_pass(hopper):
    """Of all heads at once by one kernel; a norm over each alone is XLA's, what comes then not."""

    def call(x, gain, rope):
        return prepare_heads(Projected(x=x, gain=gain, rope=rope, heads=3, eps=1e-6))

    rows, angles = abstract((2, 333, 384), jnp.bfloat16), abstract((333, 64), jnp.float32)
    for width, norms in ((384, 0), (128, 1)):
        arguments = rows, abstract((width,), jnp.float32), (angles, angles)
        text = jax.export.export(jax.jit(call), platforms=["cuda"])(*arguments).mlir_module()
        assert text.count("mosaic_gpu_v2") == 1 and text.count("stablehlo.rsqrt") == norms
