"""Wan transformers with random weights, in bf16 and on kernels, for what measures them."""

import argparse
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from models.common.full_path import FullPath
from models.common.kernel_ops import on_kernels, tile_kernels
from models.common.layers import Ops
from models.common.quantizer import InputQuantizer, SiteRule
from models.common.recipes import INPUTS, KERNELS
from models.common.semantic import Decomposition, SemanticDialect, Sharing
from models.wan.config import SIZES, WanConfig
from models.wan.sites import VIDEO_SITES, video_inputs
from pallas_kernels import MODES, device
from scripts import _results as results
from sdq import Rule, quantize_params, resolve

FORMAT = "sdq32:16"
TEXT = 512  # tokens of it
RULES = (SiteRule(INPUTS, FORMAT),)
Grid = tuple[int, int, int]


def what_to_measure(doc: str | None) -> tuple[argparse.Namespace, WanConfig, Grid]:
    """Of a script that measures one of `SIZES` on a Hopper GPU."""
    parser = results.parser(doc)
    parser.add_argument("--config", choices=list(SIZES), default="wan2.1-t2v-14b")
    parser.add_argument(
        "--grid", type=int, nargs=3, default=(21, 30, 52), help="tokens along T, H, W"
    )
    args = parser.parse_args()
    if reason := device.without_mosaic_gpu():
        parser.error(reason)
    return args, SIZES[args.config], tuple(args.grid)


def environment(name: str, args: argparse.Namespace) -> dict[str, str]:
    """Where and of what a script measured."""
    return results.environment(name, model=f"{args.config}, {' x '.join(map(str, args.grid))}")


def random_params(shapes: Any) -> Any:
    """Parameters in bf16, kernels with the spread that keeps numbers in range."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def leaf(key: jax.Array, path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        spread = shape.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.02
        return spread * jax.random.normal(key, shape.shape, jnp.bfloat16)

    make = jax.jit(leaf, static_argnums=(1, 2))
    made = [make(key, *of) for key, of in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, made)


@jax.jit
def in_4_bits(params: Any) -> Any:
    """A block with 4-bit kernels in the order of the Hopper kernel."""
    tree = {"blocks": params}
    plan = resolve([Rule(KERNELS, FORMAT, select="two_stage"), Rule(r".*", None)], tree)
    return tile_kernels(quantize_params(tree, plan))["blocks"]


def semantic_dialect(config: WanConfig, grid: Grid, layers: int) -> SemanticDialect:
    """All parts on, in so many blocks."""
    tokens = grid[0] * grid[1] * grid[2]
    return SemanticDialect(
        rules=RULES,
        grid=grid,
        sites=video_inputs(config),
        sharing=Sharing(),
        decomposition=Decomposition(
            tokens=tokens // 80 * 8,
            layers=tuple((site, tuple(range(layers))) for site in VIDEO_SITES),
        ),
    )


def ways(config: WanConfig, grid: Grid, layers: int) -> dict[str, tuple[Ops, Any]]:
    """By name: what computes on 4-bit kernels, and its state stacked over the blocks.

    In a step of sampling that neither looks nor learns, after both.
    """
    online = semantic_dialect(config, grid, layers)
    state = online.initial_state(layers, 1)
    for step in (1, 2):
        state = online.at_step(state, jnp.int32(step))
    online = dataclasses.replace(online, watches=False)
    found = {
        "plain": (Ops(quantizer=InputQuantizer(RULES)), None),
        "semanticdialect": (Ops(quantizer=online), state),
        "full_path": (Ops(quantizer=online, attention=FullPath()), state),
    }
    return {
        f"{name}, {mode}": (on_kernels(ops, mode), memory)
        for (name, (ops, memory)), mode in itertools.product(found.items(), MODES)
    }
