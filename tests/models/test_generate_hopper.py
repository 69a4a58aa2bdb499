"""A step of sampling on kernels, lowered for a Hopper GPU: all that a recipe rounds takes them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from models import generate
from models.common import recipes
from models.common.kernel_ops import on_kernels, tile_kernels, without_kernels
from models.common.layers import Ops
from models.common.sampler import Sampler, begin, steps_of
from models.families import FAMILIES
from models.mmdit.config import SIZES as MMDIT_SIZES
from models.wan.config import SIZES as WAN_SIZES

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11")

SMALL = {
    "wan2.1-t2v-1.3b": {"layers": 2, "ffn_width": 256},
    "open-sora-2.0": {"double_blocks": 2, "single_blocks": 2, "mlp_width": 512},
    "hunyuanvideo": {"double_blocks": 2, "single_blocks": 2, "mlp_width": 512},
}
LATENTS = (2, 8, 8)


def hopper():
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_lowers(name):
    family = next(family for family in FAMILIES if name in family.sizes)
    large = {**WAN_SIZES, **MMDIT_SIZES}[name]
    config = dataclasses.replace(large, width=128, heads=1, **SMALL[name])
    recipe = recipes.named("plain")
    shapes = family.params.abstract_params(config)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
    plan = recipes.plan(shapes, recipe, family.sites)
    params = jax.eval_shape(lambda tree: sdq.quantize_params(tree, plan), shapes)
    ops = Ops(quantizer=recipes.quantizer(recipe, grid=(1, 1, 1), sites=()))
    arguments = {"text": jnp.zeros((1, 16, config.text_width))}
    if name != "wan2.1-t2v-1.3b":
        arguments["pooled"] = jnp.zeros((1, config.pooled_width))
    if name == "hunyuanvideo":
        arguments |= {"text_lengths": jnp.array([9]), "guidance": jnp.ones(1)}
    if name == "open-sora-2.0":
        arguments["cond"] = jnp.zeros((1, *LATENTS, config.cond_channels))
    step = jax.tree.map(lambda numbers: numbers[1], steps_of(Sampler(steps=3)))
    advance = functools.partial(
        generate._advance, model=family.model(config, on_kernels(ops), jnp.bfloat16)
    )
    inputs = (
        jax.eval_shape(tile_kernels, params),
        begin(jnp.zeros((1, *LATENTS, config.out_channels))),
        step,
        np.float32(500),
        np.float32(5),
        arguments,
        None if name == "hunyuanvideo" else arguments,
    )
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), inputs)
    with hopper():
        assert without_kernels(ops, params) is None
        after, is_finite = jax.eval_shape(advance, *inputs)
        text = jax.export.export(jax.jit(advance), platforms=["cuda"])(*inputs).mlir_module()
    assert after.x.shape == (1, *LATENTS, config.out_channels) and is_finite.shape == ()
    linears = {linear for linears in family.sites.values() for linear in linears}
    assert len(re.findall(r"call @matmul(_few)?(_\d+)?\(", text)) >= len(linears)
