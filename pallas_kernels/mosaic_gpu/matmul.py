"""The matmul of 4-bit weights and fp8 or bf16 rows on Hopper's tensor cores.

out^T = W x^T, a tile of `tile_n` weight rows by `tile_m` rows of x at a time. One warpgroup copies
operands into shared memory, a ring of `stages` slots that never drains between tiles; the others
decode their part of the weight tile into registers and multiply. The weights of the next slot are
decoded while the tensor cores work on this one.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.config import PIECE_N, TILE_K, Config
from pallas_kernels.mosaic_gpu.decode import add_signs, decode_magnitudes, decoded, word_layout
from pallas_kernels.mosaic_gpu.memory import free_barrier, load, swizzled
from pallas_kernels.mosaic_gpu.operands import TiledWeight
from pallas_kernels.mosaic_gpu.tables import look_up_table

PRODUCER_REGISTERS = 24
REGISTERS = 65536  # of an SM


def matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: TiledWeight,
    w_scale: jax.Array,
    bias: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
    config: Config,
    out_dtype: Any,
    num_sms: int,
    interpret: Any = None,
) -> jax.Array:
    """activation((x x_scale) (w w_scale)^T + bias).

    Args:
      x: e4m3 or bf16 `[M, K]`, interleaved; whole tiles, as w.
      x_scale: float32 `[M]`, of the rows.
      w: the weight, of N rows with those that fill the last tile.
      w_scale: float32 `[N]`.
      bias: float32 `[N]`.
      activation: of single numbers.
      config: how.
      out_dtype: of the result.
      num_sms: of the GPU.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU, where weights are decoded by `decoded`
        and multiplied from shared memory, because the interpreter knows neither kind of register.
    Returns:
      `[M, N]`.
    """
    if x.dtype.itemsize != config.x_bytes:
        raise ValueError(f"config: x_bytes is {config.x_bytes}, but x is {x.dtype}")
    m, _ = x.shape
    n = w.words.shape[0]
    table = jnp.asarray(look_up_table(w.format, x.dtype)).reshape(-1, 128)
    tiles_m, tiles_n = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n * config.cluster)
    steps = w.metadata.shape[0]
    halves = w.halves
    width = config.rows_n * halves  # words of metadata of a warpgroup

    def kernel(
        x_g, xs_g, words_g, metadata_g, table_g, ws_g, bias_g, out_g,
        x_s, words_s, metadata_s, table_s, out_s, weights_s, full, free, table_ready,
    ):  # fmt: skip
        group = lax.axis_index("warpgroup")
        peer = lax.axis_index("peer")
        first = lax.axis_index("block")
        blocks = lax.axis_size("block")
        own = lax.div(tiles_m * tiles_n - first + blocks - 1, blocks)

        def place(turn):
            """Of this block's turn-th tile: its first row of x and its first row of w."""
            tile_n, tile_m = plgpu.planar_snake(
                first + turn * blocks, (tiles_n, tiles_m), 1, config.width
            )
            return tile_m * config.tile_m, (tile_n * config.cluster + peer) * config.tile_n

        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def fill(step, _):
                slot = lax.rem(step, config.stages)
                k = lax.rem(step, steps)
                at_m, at_n = place(lax.div(step, steps))

                @pl.when(step >= config.stages)
                def wait_until_free():
                    plgpu.barrier_wait(free.at[slot])

                barrier = full.at[slot]
                plgpu.copy_gmem_to_smem(
                    x_g.at[pl.ds(at_m, config.tile_m), pl.ds(k * TILE_K, TILE_K)],
                    x_s.at[slot],
                    barrier,
                    collective_axes="peer" if config.cluster > 1 else None,
                )
                plgpu.copy_gmem_to_smem(
                    words_g.at[pl.ds(at_n, config.tile_n), pl.ds(k * 16, 16)],
                    words_s.at[slot],
                    barrier,
                )
                for part in range(config.warpgroups):  # a copy is at most 256 wide
                    at = at_n * halves + part * width
                    plgpu.copy_gmem_to_smem(
                        metadata_g.at[k, pl.ds(at, width)], metadata_s.at[slot, part], barrier
                    )

            total = own * steps
            lax.fori_loop(0, total + 1, fill, None)  # the last is decoded, never multiplied

            # A block must not leave while its peer still signals to it.
            def drain(step, _):
                plgpu.barrier_wait(free.at[lax.rem(step, config.stages)])

            lax.fori_loop(lax.max(total + 1 - config.stages, 0), total, drain, None)

        def consume():
            plgpu.set_max_registers(_registers(config.warpgroups), action="increase")

            @pl.when(group == 0)
            def fetch_table():
                plgpu.copy_gmem_to_smem(table_g, table_s, table_ready)

            plgpu.barrier_wait(table_ready)
            rows = pl.ds(group * config.rows_n, config.rows_n)

            def weights(step):
                """Of a slot, once it is full: magnitudes and words."""
                slot = lax.rem(step, config.stages)
                plgpu.barrier_wait(full.at[slot])
                metadata = metadata_s.at[slot, group]
                if interpret is not None:
                    words = words_s[slot, rows]
                    parts = words, metadata[...], table_s[...]
                    return decoded(*parts, halves=halves, dtype=x.dtype), words
                words = load(words_s.at[slot, rows], word_layout())
                held = decode_magnitudes(words, metadata, table_s, halves=halves, dtype=x.dtype)
                return held, words

            def operand(held):
                """Of `wgmma`."""
                if interpret is None:
                    return add_signs(*held)
                weights_s[group], _ = held
                plgpu.commit_smem()
                return weights_s.at[group]

            def sum_slots(begin, count, held):
                """What the tensor cores sum up: the products of slots, for all columns at once."""

                def run(acc):
                    def step(number, held):
                        slot = lax.rem(number, config.stages)
                        plgpu.wgmma(acc, operand(held), x_s.at[slot].T)
                        held = weights(number + 1)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot])
                        return held

                    held_then = lax.fori_loop(begin, begin + count, step, held)
                    return acc[...], held_then

                return pl.run_scoped(run, plgpu.ACC((config.rows_n, config.tile_m), jnp.float32))

            def promoted(begin, held):
                """Float32 sums of what the tensor cores sum up in each group of slots."""
                every = config.promote

                def add(first, count, state):
                    total, held = state
                    product, held = sum_slots(first, count, held)
                    return total + product, held

                zeros = jnp.zeros((config.rows_n, config.tile_m), jnp.float32)
                state = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA), held
                state = lax.fori_loop(
                    0, steps // every, lambda i, state: add(begin + i * every, every, state), state
                )
                if rest := steps % every:
                    state = add(begin + steps - rest, rest, state)
                return state

            def tile(turn, held):
                begin = turn * steps
                if config.promote:
                    total, held = promoted(begin, held)
                else:
                    total, held = sum_slots(begin, steps, held)
                at_m, at_n = place(turn)
                store(total, turn, at_m, at_n + group * config.rows_n)
                return held

            def store(total, turn, at_m, at_n):
                """Scale, add the bias and send a warpgroup's result out, piece by piece."""
                by_row = plgpu.Layout.WGMMA.reduce(1)
                by_column = plgpu.Layout.WGMMA.reduce(0)
                pieces = list(
                    itertools.product(
                        range(0, config.rows_n, PIECE_N),
                        range(0, config.tile_m, config.piece),
                    )
                )
                for number, (j, i) in enumerate(pieces):
                    piece = total[j : j + PIECE_N, i : i + config.piece]
                    of_n = pl.ds(at_n + j, PIECE_N)
                    of_m = pl.ds(at_m + i, config.piece)
                    w_scale, bias = load(ws_g.at[of_n], by_row), load(bias_g.at[of_n], by_row)
                    x_scale = load(xs_g.at[of_m], by_column)
                    shape = piece.shape
                    y = piece * lax.broadcast_in_dim(x_scale, shape, (1,))
                    y = y * lax.broadcast_in_dim(w_scale, shape, (0,))
                    y = y + lax.broadcast_in_dim(bias, shape, (0,))
                    slot = out_s.at[group, lax.rem(turn * len(pieces) + number, 2)]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    slot.T[...] = plgpu.layout_cast(
                        activation(y).astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED
                    )
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(slot, out_g.at[of_m, of_n])

            lax.fori_loop(0, own, tile, weights(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(group == config.warpgroups, produce, consume)

    ring = functools.partial(swizzled, stages=config.stages)
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(num_sms // config.cluster,),
        grid_names=("block",),
        cluster=(config.cluster,),
        cluster_names=("peer",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=dict[str, Any](
            x_s=ring((config.tile_m, TILE_K), x.dtype),
            words_s=ring((config.tile_n, TILE_K // 8), jnp.uint32),
            metadata_s=plgpu.SMEM((config.stages, config.warpgroups, width), jnp.uint32),
            table_s=plgpu.SMEM(table.shape, jnp.uint32),
            weights_s=None
            if interpret is None
            else plgpu.SMEM((config.warpgroups, config.rows_n, TILE_K), x.dtype),
            out_s=swizzled((2, config.piece, PIECE_N), out_dtype, stages=config.warpgroups),
            full=plgpu.Barrier(num_arrivals=2 + config.warpgroups, num_barriers=config.stages),
            free=free_barrier(
                readers=config.warpgroups, stages=config.stages, cluster=config.cluster
            ),
            table_ready=plgpu.Barrier(),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return call(
        x,
        _padded(x_scale, config.tile_m),
        w.words,
        w.metadata,
        table,
        _padded(w_scale, config.tile_n * config.cluster),
        _padded(bias, config.tile_n * config.cluster),
    )


def _registers(warpgroups: int) -> int:
    """Of a thread that multiplies: what the copying warpgroup leaves of those at the start.

    Asking for one more would wait for ever.
    """
    at_start = REGISTERS // (128 * (warpgroups + 1)) // 8 * 8
    left = at_start * (warpgroups + 1) - PRODUCER_REGISTERS
    return min(256, left // warpgroups // 8 * 8)


def _padded(x: jax.Array, to: int) -> jax.Array:
    return jnp.pad(x, (0, -x.shape[0] % to))
