"""Flash attention of e4m3 queries, keys and values on Hopper's fp8 tensor cores.

A block computes 128 queries of a head, two warpgroups 64 each; a third one copies keys and values
into two rings of tiles. While the tensor cores multiply for one warpgroup, the other turns scores
into weights (`softmax.py`), which takes no exponentials. In each step a warpgroup starts
the scores of a tile and the weighted sum of the tile before, weighs the scores when they arrive,
and adds the weighted sum to its float32 totals when that does: sums of one sign must not stay long
in the tensor cores, which keep some 14 bits of them.

The sum of the weights is one more column of the values, all ones. A key that is padded or masked
has zeros there and in its values, so that nobody needs to look at it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import attention_plain, products, products_plain, weighing
from pallas_kernels.mosaic_gpu.attention_operands import KEYS, ONES
from pallas_kernels.mosaic_gpu.config import PRODUCER_REGISTERS, ROWS, consumer_registers
from pallas_kernels.mosaic_gpu.memory import following, free_barrier, load, swizzled
from pallas_kernels.mosaic_gpu.products import accumulator_layout
from pallas_kernels.mosaic_gpu.softmax import FAR

GROUPS = 2  # warpgroups that compute


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """How it is cut.

    Attributes:
      stages: tiles of keys, and as many of values, on their way.
      cluster: blocks that share them, 1 or 2.
    """

    stages: int = 4
    cluster: int = 2


def heuristic(block: int | None) -> AttentionConfig:
    """The fastest in whose tiles all queries see the same keys; `block` as `attend` takes it."""
    config = AttentionConfig()
    apart = block is not None and block % (ROWS * GROUPS * config.cluster)
    return dataclasses.replace(config, cluster=1) if apart else config


@functools.partial(
    jax.jit, static_argnames=("heads", "block", "config", "out_dtype", "num_sms", "interpret")
)
def attend(
    q: jax.Array,
    slope: jax.Array,
    k: jax.Array,
    v: jax.Array,
    v_scale: jax.Array,
    *,
    heads: int,
    block: int | None = None,
    config: AttentionConfig,
    out_dtype: Any,
    num_sms: int,
    interpret: Any = None,
) -> jax.Array:
    """softmax(q k^T) v.

    Args:
      q: e4m3 `[B * heads, S, D]`, S a multiple of 8.
      slope: of each query, float16 numbers in float32 `[B * heads, S]`: what a unit of its scores
        is worth, in octaves / 16.
      k: e4m3 `[B * heads, L, D]`, L a multiple of KEYS.
      v: e4m3 `[B * heads, D + ONES, L]`, keys in the order of `attention_operands.in_order`.
      v_scale: float32 `[B * heads, D]`.
      heads: of a video.
      block: tokens that see each other and those before, whole tiles of keys and of queries; None:
        all see all.
      config: how.
      out_dtype: of the result.
      num_sms: of the GPU.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.
    Returns:
      `[B, S, heads, D]`.
    """
    rows, length, width = q.shape
    together = ROWS * GROUPS * config.cluster  # queries of a tile
    if block is not None and (block % KEYS or block % together):
        raise ValueError(f"block: expected a multiple of {max(KEYS, together)}, got {block}")
    tiles = pl.cdiv(length, together)  # of a head
    channels = width + ONES
    multiply = products if interpret is None else products_plain
    softmax = weighing if interpret is None else attention_plain

    def kernel(
        q_g, slope_g, k_g, v_g, scale_g, out_g,
        q_s, k_s, v_s, out_s, q_full, q_free, k_full, k_free, v_full, v_free,
    ):  # fmt: skip
        group = lax.axis_index("warpgroup")
        peer = lax.axis_index("peer")
        first, blocks = lax.axis_index("block"), lax.axis_size("block")
        own = lax.div(rows * tiles - first + blocks - 1, blocks)

        def place(turn):
            """Of this block's turn-th tile: head, first query, how many tiles of keys it sees."""
            tile = first + turn * blocks
            head, tile = lax.div(tile, tiles), lax.rem(tile, tiles)
            at = (tile * config.cluster + peer) * ROWS * GROUPS
            if block is None:
                return head, at, k.shape[1] // KEYS
            return head, at, (lax.div(tile * together, block) + 1) * (block // KEYS)

        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            shared = "peer" if config.cluster > 1 else None

            def tile(turn, state):
                head, at, steps = place(turn)

                @pl.when(turn > 0)
                def wait_until_queries_are_read():
                    plgpu.barrier_wait(q_free)

                plgpu.copy_gmem_to_smem(q_g.at[head, pl.ds(at, ROWS * GROUPS)], q_s, q_full)

                def step(i, state):
                    slot, filled = state
                    keys = pl.ds(i * KEYS, KEYS)

                    @pl.when(filled >= config.stages)
                    def wait_until_keys_are_read():
                        plgpu.barrier_wait(k_free.at[slot])

                    plgpu.copy_gmem_to_smem(
                        k_g.at[head, keys], k_s.at[slot], k_full.at[slot], collective_axes=shared
                    )

                    @pl.when(filled >= config.stages)
                    def wait_until_values_are_read():
                        plgpu.barrier_wait(v_free.at[slot])

                    for part, by in ((pl.ds(0, width), shared), (pl.ds(width, ONES), None)):
                        plgpu.copy_gmem_to_smem(
                            v_g.at[head, part, keys],
                            v_s.at[slot, part],
                            v_full.at[slot],
                            collective_axes=by,
                        )
                    return following(slot, config.stages), filled + 1

                return lax.fori_loop(0, steps, step, state)

            slot, filled = lax.fori_loop(0, own, tile, (0, 0))

            # A block must not leave while its peer still signals to it.
            def drain(_, slot):
                for free in (k_free, v_free):
                    plgpu.barrier_wait(free.at[slot])
                return following(slot, config.stages)

            few = filled < config.stages
            left = jnp.where(few, filled, config.stages)
            lax.fori_loop(0, left, drain, jnp.where(few, 0, slot))

            @pl.when(own > 0)
            def wait_for_the_last():
                plgpu.barrier_wait(q_free)

        def consume():
            plgpu.set_max_registers(consumer_registers(GROUPS), action="increase")
            by_row = plgpu.Layout.WGMMA.reduce(1)
            by_column = plgpu.Layout.WGMMA.reduce(0)
            queries = q_s.at[pl.ds(group * ROWS, ROWS)]

            def scores(slot):
                plgpu.barrier_wait(k_full.at[slot])
                return multiply.begin(queries, k_s.at[slot], jnp.float16)

            def weighted(weights, slot):
                plgpu.barrier_wait(v_full.at[slot])
                return multiply.begin(weights, v_s.at[slot])

            def tile(turn, slot):
                head, at, steps = place(turn)
                of_q = pl.ds(at + group * ROWS, ROWS)
                slopes = load(slope_g.at[head, of_q], by_row)
                plgpu.barrier_wait(q_full)

                far = plgpu.layout_cast(jnp.full((ROWS,), FAR, jnp.float32), by_row)
                (of_scores,) = multiply.arrived(scores(slot), pending=0)
                plgpu.barrier_arrive(k_free.at[slot])
                codes, seen, offset, keep = softmax.weigh(of_scores, -far, far, slopes)
                weights = softmax.join(codes)
                # `keep` has nothing to keep yet, but is NaN where a score is.
                nothing = jnp.zeros((ROWS, channels), jnp.float32)
                totals = plgpu.layout_cast(nothing, accumulator_layout())

                def step(_, state):
                    before, totals, weights, seen, offset, keep = state
                    slot = following(before, config.stages)
                    of_scores = scores(slot)
                    of_values = weighted(weights, before)
                    (of_scores,) = multiply.arrived(of_scores, pending=1)
                    plgpu.barrier_arrive(k_free.at[slot])
                    codes, seen, offset, decay = softmax.weigh(of_scores, seen, offset, slopes)
                    of_values, codes = multiply.arrived(of_values, codes, pending=0)
                    plgpu.barrier_arrive(v_free.at[before])
                    totals = softmax.add(totals, keep, of_values)
                    return slot, totals, softmax.join(codes), seen, offset, decay

                state = (slot, totals, weights, seen, offset, keep)
                state = lax.fori_loop(1, steps, step, state)
                slot, totals, weights, _, _, keep = state
                plgpu.barrier_arrive(q_free)
                (of_values,) = multiply.arrived(weighted(weights, slot), pending=0)
                plgpu.barrier_arrive(v_free.at[slot])
                y = softmax.divide(softmax.add(totals, keep, of_values), width)
                scale = load(scale_g.at[head], by_column)
                y = y * lax.broadcast_in_dim(scale, y.shape, (1,))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                mine = out_s.at[group]
                mine[...] = y.astype(out_dtype)
                plgpu.commit_smem()
                batch, h = lax.div(head, heads), lax.rem(head, heads)
                plgpu.copy_smem_to_gmem(mine, out_g.at[batch, of_q, h])
                return following(slot, config.stages)

            lax.fori_loop(0, own, tile, 0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(group == GROUPS, produce, consume)

    barriers = functools.partial(plgpu.Barrier, num_barriers=config.stages)
    ring = functools.partial(swizzled, stages=config.stages)
    free = functools.partial(
        free_barrier, readers=GROUPS, stages=config.stages, cluster=config.cluster
    )
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows // heads, length, heads, width), out_dtype),
        grid=(num_sms // config.cluster,),
        grid_names=("block",),
        cluster=(config.cluster,),
        cluster_names=("peer",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict[str, Any](
            q_s=swizzled((ROWS * GROUPS, width), q.dtype),
            k_s=ring((KEYS, width), k.dtype),
            v_s=ring((channels, KEYS), v.dtype),
            out_s=swizzled((ROWS, width), out_dtype, stages=GROUPS),
            q_full=plgpu.Barrier(),
            q_free=plgpu.Barrier(num_arrivals=GROUPS),
            k_full=barriers(),
            k_free=free(),
            v_full=barriers(num_arrivals=2),
            v_free=free(),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    queries = tiles * ROWS * GROUPS * config.cluster
    slope = jnp.pad(slope, ((0, 0), (0, queries - length)), constant_values=1.0)
    return call(q, slope, k, v, v_scale)
