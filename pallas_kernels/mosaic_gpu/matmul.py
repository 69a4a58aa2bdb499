"""The matmul of 4-bit weights and fp8 rows on Hopper's tensor cores.

out^T = W x^T, a tile of `tile_n` weight rows by `tile_m` rows of x at a time. One warpgroup copies
operands into shared memory, a ring of `stages` slots that never drains between tiles; the others
decode their part of the weight tile into registers and multiply. The weights of the next slot are
decoded while the tensor cores work on this one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.decode import add_signs, decode_magnitudes, decoded, word_layout
from pallas_kernels.mosaic_gpu.operands import TILE_K, TiledWeight, look_up_table

PRODUCER_REGISTERS = 40
REGISTERS = 512  # of a thread of each warpgroup of a full SM


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the work is cut.

    Attributes:
      rows_n: weight rows of a warpgroup, a multiple of 64.
      tile_m: rows of x, at most 256.
      warpgroups: that multiply.
      stages: slots of the ring.
      cluster: blocks that share each tile of x, 1 or 2.
      promote: tiles of K (of 128 channels) that the tensor cores sum up before float32 registers
        take over; 0 is all. Their own sums of fp8 products keep some 14 bits.
      width: tiles along M before the next tile along N, for reuse in L2.
    """

    rows_n: int = 64
    tile_m: int = 256
    warpgroups: int = 2
    stages: int = 4
    cluster: int = 1
    promote: int = 0
    width: int = 8

    @property
    def tile_n(self) -> int:
        """Weight rows of a block."""
        return self.rows_n * self.warpgroups


def matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: TiledWeight,
    w_scale: jax.Array,
    bias: jax.Array,
    *,
    config: Config,
    out_dtype: Any,
    num_sms: int,
    interpret: Any = None,
) -> jax.Array:
    """(x 2^x_exponent) (w 2^w_exponent)^T + bias.

    Args:
      x: e4m3 `[M, K]`, interleaved.
      x_scale: float32 `[M]`, of the rows.
      w: the weight, of N rows.
      w_scale: float32 `[N]`.
      bias: float32 `[N]`.
      config: how.
      out_dtype: of the result.
      num_sms: of the GPU.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU, where weights are decoded by `decoded`
        and multiplied from shared memory, because the interpreter knows neither kind of register.
    Returns:
      `[M, N]`.
    """
    m, _ = x.shape
    n = w.words.shape[0]
    tiles_m, tiles_n = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n * config.cluster)
    steps = w.metadata.shape[0]
    halves = w.halves
    width = config.rows_n * halves  # words of metadata of a warpgroup
    store_n = min(64, config.rows_n)

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
            registers = min(256, (REGISTERS - PRODUCER_REGISTERS) // config.warpgroups) // 8 * 8
            plgpu.set_max_registers(registers, action="increase")

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
                    return decoded(words, metadata[...], table_s[...], halves=halves), words
                words = _load(words_s.at[slot, rows], word_layout())
                return decode_magnitudes(words, metadata, table_s, halves=halves), words

            def multiply_into(acc, held, slot):
                if interpret is None:
                    plgpu.wgmma(acc, add_signs(*held), x_s.at[slot].T)
                else:
                    weights_s[group], _ = held
                    plgpu.commit_smem()
                    plgpu.wgmma(acc, weights_s.at[group], x_s.at[slot].T)

            def accumulate(begin, count, a):
                """The product of slots, the first decoded in a; and what comes next, decoded."""

                def step(number, a, acc):
                    slot = lax.rem(number, config.stages)
                    multiply_into(acc, a, slot)
                    a = weights(number + 1)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])
                    return a

                def run(acc):
                    one = functools.partial(step, acc=acc)
                    return lax.fori_loop(begin, begin + count, one, a), acc[...]

                a, product = pl.run_scoped(
                    run, plgpu.ACC((config.rows_n, config.tile_m), jnp.float32)
                )
                return product, a

            def tile(turn, a):
                begin, every = turn * steps, config.promote or steps
                total, a = accumulate(begin, min(every, steps), a)

                def more(group, held):
                    product, a = accumulate(begin + group * every, every, held[1])
                    return held[0] + product, a

                total, a = lax.fori_loop(1, steps // every, more, (total, a))
                if rest := steps % every * (steps > every):
                    product, a = accumulate(begin + steps - rest, rest, a)
                    total = total + product
                at_m, at_n = place(turn)
                store(total, turn, at_m, at_n + group * config.rows_n)
                return a

            def store(acc, turn, at_m, at_n):
                """Scale, add the bias and send a warpgroup's result out, 64 by 64."""
                by_row = plgpu.Layout.WGMMA.reduce(1)
                by_column = plgpu.Layout.WGMMA.reduce(0)
                pieces = [
                    (i, j)
                    for j in range(0, config.rows_n, store_n)
                    for i in range(0, config.tile_m, 64)
                ]
                for number, (i, j) in enumerate(pieces):
                    piece = acc[j : j + store_n, i : i + 64]
                    w_scale = _load(ws_g.at[pl.ds(at_n + j, store_n)], by_row)
                    bias = _load(bias_g.at[pl.ds(at_n + j, store_n)], by_row)
                    x_scale = _load(xs_g.at[pl.ds(at_m + i, 64)], by_column)
                    shape = piece.shape
                    y = piece * lax.broadcast_in_dim(x_scale, shape, (1,))
                    y = y * lax.broadcast_in_dim(w_scale, shape, (0,))
                    y = y + lax.broadcast_in_dim(bias, shape, (0,))
                    slot = out_s.at[group, lax.rem(turn * len(pieces) + number, 2)]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    slot.T[...] = plgpu.layout_cast(
                        y.astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED
                    )
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        slot, out_g.at[pl.ds(at_m + i, 64), pl.ds(at_n + j, store_n)]
                    )

            lax.fori_loop(0, own, tile, weights(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(group == config.warpgroups, produce, consume)

    swizzled = functools.partial(_swizzled, stages=config.stages)
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
            x_s=swizzled((config.tile_m, TILE_K), jnp.float8_e4m3fn),
            words_s=swizzled((config.tile_n, TILE_K // 8), jnp.uint32),
            metadata_s=plgpu.SMEM((config.stages, config.warpgroups, width), jnp.uint32),
            table_s=plgpu.SMEM((4, 128), jnp.uint32),
            weights_s=None
            if interpret is None
            else plgpu.SMEM((config.warpgroups, config.rows_n, TILE_K), jnp.float8_e4m3fn),
            out_s=_swizzled((2, 64, store_n), out_dtype, stages=config.warpgroups),
            full=plgpu.Barrier(num_arrivals=2 + config.warpgroups, num_barriers=config.stages),
            free=_free_barrier(config),
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
        jnp.asarray(look_up_table(w.format)).reshape(4, 128),
        _padded(w_scale, config.tile_n * config.cluster),
        _padded(bias, config.tile_n * config.cluster),
    )


def _load(ref: Any, layout: Any) -> jax.Array:
    """Into registers; `optimized` would insist on the fastest path that Mosaic knows."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # jax < 0.11


def _free_barrier(config: Config) -> Any:
    """Signals that all who read a slot are done with it."""
    if config.cluster == 1:
        return plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages)
    return plgpu.ClusterBarrier(
        collective_axes=("peer",), num_arrivals=config.warpgroups, num_barriers=config.stages
    )


def _swizzled(shape: tuple[int, ...], dtype: Any, *, stages: int) -> Any:
    """Shared memory `[stages, *shape]` in the order that TMA and `wgmma` agree on."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
    return plgpu.SMEM((stages, *shape), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _padded(x: jax.Array, to: int) -> jax.Array:
    return jnp.pad(x, (0, -x.shape[0] % to))
