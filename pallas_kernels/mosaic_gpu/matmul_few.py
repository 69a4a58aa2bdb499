"""The matmul of 4-bit weights and a few rows on Hopper: as fast as memory gives the weights.

out^T = W x^T, a tile of 64 weight rows at a time, by all warpgroups of a block together: each
multiplies some of the channels, and one adds up what they found. Each decodes a slot of DEEP tiles
of channels, whose reads overlap, and then multiplies; while one waits for its numbers, others work.

The least that tensor cores multiply with is eight rows. A single one is read as eight tiles of its
channels, so that nobody has to fill it up: of what a tile's weights give with these, one column
counts. It is copied once, and its results leave from registers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import memory, products, products_plain
from pallas_kernels.mosaic_gpu.config import (
    DEEP,
    PRODUCER_REGISTERS,
    ROWS,
    TILE_K,
    FewConfig,
    consumer_registers,
)
from pallas_kernels.mosaic_gpu.decode import add_signs, decode_magnitudes, decoded, places
from pallas_kernels.mosaic_gpu.epilogue import BY_W, BY_X, finished, store_transposed
from pallas_kernels.mosaic_gpu.memory import by_warps, copy_as_it_lies, following, load, swizzled
from pallas_kernels.mosaic_gpu.operands import TiledWeight
from pallas_kernels.mosaic_gpu.products import accumulator_layout
from pallas_kernels.mosaic_gpu.tables import look_up_table
from sdq.numerics import power_of_two

ROWS_OF_ONE = 8  # as which a single one is read: tiles of its channels
MOST_STEPS = 256  # tiles of a single row, which lies in shared memory as a whole


@functools.partial(
    jax.jit, static_argnames=("activation", "config", "out_dtype", "num_sms", "interpret")
)
def matmul_few(
    x: jax.Array,
    x_exponents: jax.Array | None,
    w: TiledWeight,
    bias: jax.Array | None,
    *,
    activation: Callable[[jax.Array], jax.Array],
    config: FewConfig,
    out_dtype: Any,
    num_sms: int,
    interpret: Any = None,
) -> jax.Array:
    """As `matmul.matmul`, for up to `config.rows` rows of x."""
    m, length = x.shape
    if x.dtype.itemsize != config.x_bytes or m > config.rows:
        raise ValueError(f"config: {config} is not for {x.dtype}{list(x.shape)}")
    n = w.rows
    table = jnp.asarray(look_up_table(w.format, x.dtype)).reshape(-1, 128)
    steps, tiles, size = w.groups.shape
    deep = min(DEEP, steps)  # a copy from behind the only tile of x would bring that one again
    slots = pl.cdiv(steps, deep)  # that a tile of the result takes
    sharing = config.warpgroups
    multiply: Any = products if interpret is None else products_plain
    alone = (
        m == 1 and config.rows == ROWS_OF_ONE and steps % ROWS_OF_ONE == 0 and steps <= MOST_STEPS
    )

    def kernel(
        x_g, xe_g, w_g, table_g, ws_g, bias_g, out_g,
        x_s, w_s, table_s, sums_s, out_s, decoded_s,
        full, free, table_ready, x_ready, sums_written, sums_read,
    ):  # fmt: skip
        group = lax.axis_index("warpgroup")
        first, blocks = lax.axis_index("block"), lax.axis_size("block")
        own = lax.div(tiles - first + blocks - 1, blocks)

        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def copy_w(k, tile, slot, part):
                # Of what is not there, any: its channels of x are zero.
                of_w = w_g.at[lax.min(k, steps - 1), tile]
                copy_as_it_lies(of_w, w_s.at[slot, part], full.at[slot])

            def copy_x(k, _, slot, part):
                of_x = x_g.at[:, pl.ds(k * TILE_K, TILE_K)]
                plgpu.copy_gmem_to_smem(of_x, x_s.at[slot * deep + part], full.at[slot])

            def fill_all(copy):
                """Its part of each slot in turn, once that is free."""

                def fill(number, slot):
                    turn = lax.div(number, slots)
                    first_k = (number - turn * slots) * deep

                    @pl.when(number >= config.stages)
                    def wait_until_read():
                        plgpu.barrier_wait(free.at[slot])

                    for part in range(deep):
                        copy(first_k + part, first + turn * blocks, slot, part)
                    return following(slot, config.stages)

                lax.fori_loop(0, own * slots, fill, 0)

            if alone:
                plgpu.copy_gmem_to_smem(x_g, x_s, x_ready)
            copies = [copy_w] if alone else [copy_w, copy_x]
            by_warps(*(functools.partial(fill_all, copy) for copy in copies))

        def consume():
            plgpu.set_max_registers(consumer_registers(sharing), action="increase")

            @pl.when(group == 0)
            def fetch_table():
                plgpu.copy_gmem_to_smem(table_g, table_s, table_ready)

            plgpu.barrier_wait(table_ready)
            if alone:
                plgpu.barrier_wait(x_ready)
            shape = ROWS, config.rows
            columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=accumulator_layout())

            words_at: Any = places() if interpret is None else None

            def operand(slot, part):
                """Of `wgmma`: the weights of a tile of channels."""
                if interpret is None:
                    of_w = w_s.at[slot, part]
                    held = decode_magnitudes(
                        of_w, table_s, words_at, halves=w.halves, dtype=x.dtype
                    )
                    return add_signs(*held)
                decoded_s[group, part] = decoded(w_s[slot, part], table_s[...], dtype=x.dtype)
                plgpu.commit_smem()
                return decoded_s.at[group, part]

            def tile(turn, number):
                """A slot of this warpgroup is `number`: those that differ by `sharing`."""
                end = (turn + 1) * slots
                at = pl.ds((first + turn * blocks) * ROWS, ROWS)
                # Now, so that nobody waits for them at the end.
                scale = None
                if xe_g is not None:
                    exponents = xe_g[0] if alone else load(xe_g, BY_X)
                    scale = power_of_two(exponents.astype(jnp.int32))
                w_scale = load(ws_g.at[at], BY_W)
                of_bias = None if bias_g is None else load(bias_g.at[at], BY_W)
                finish = functools.partial(
                    finished, x_scale=scale, w_scale=w_scale, bias=of_bias, activation=activation
                )

                def step(_, state):
                    total, number = state
                    slot = lax.rem(number, config.stages)
                    first_k = lax.rem(number, slots) * deep
                    plgpu.barrier_wait(full.at[slot])
                    held = [operand(slot, part) for part in range(deep)]
                    begun = []
                    for part, of_w in enumerate(held):
                        at_x = lax.div(first_k, ROWS_OF_ONE) if alone else slot * deep + part
                        begun.append(multiply.begin(of_w, x_s.at[at_x]))
                    found = multiply.arrived(*begun, pending=0)
                    plgpu.barrier_arrive(free.at[slot])
                    for part, product in enumerate(found):
                        if alone:
                            column = lax.rem(first_k, ROWS_OF_ONE) + part
                            product = jnp.where(columns == column, product, 0.0)
                        total = total + product
                    return total, number + sharing

                zeros = jnp.zeros((ROWS, config.rows), jnp.float32)
                zeros = plgpu.layout_cast(zeros, accumulator_layout())
                mine = lax.div(end - number + sharing - 1, sharing)
                total, number = lax.fori_loop(0, mine, step, (zeros, number))
                total = multiply.in_pairs(total)
                for other in range(1, sharing):
                    pl.when(group == other)(functools.partial(hand_over, total, other, turn))
                pl.when(group == 0)(functools.partial(store, total, finish, at))
                return number

            def hand_over(total, other, turn):
                """Give a warpgroup's sums to the first one."""

                @pl.when(turn > 0)
                def wait_until_read():
                    plgpu.barrier_wait(sums_read)

                sums_s[other - 1] = total
                plgpu.barrier_arrive(sums_written)

            def store(total, finish, at):
                """Add up, and send the result out."""
                if sharing > 1:
                    plgpu.barrier_wait(sums_written)
                    for other in range(sharing - 1):
                        total = total + load(sums_s.at[other], plgpu.Layout.WGMMA)
                    plgpu.barrier_arrive(sums_read)
                if alone:
                    memory.store(out_g.at[0, at], finish(jnp.sum(total, axis=1)).astype(out_dtype))
                    return
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                store_transposed(out_s, finish(total).astype(out_dtype))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s, out_g.at[:, at])

            lax.fori_loop(0, own, tile, group)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(group == sharing, produce, consume)

    tiles_of_x = steps // ROWS_OF_ONE if alone else config.stages * deep
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((1 if alone else config.rows, n), out_dtype),
        grid=(min(num_sms, tiles),),
        grid_names=("block",),
        num_threads=sharing + 1,
        thread_name="warpgroup",
        scratch_types=dict[str, Any](
            x_s=swizzled((config.rows, TILE_K), x.dtype, stages=tiles_of_x),
            w_s=plgpu.SMEM((config.stages, deep, size), jnp.uint32),
            table_s=plgpu.SMEM(table.shape, jnp.uint32),
            sums_s=swizzled((ROWS, config.rows), jnp.float32, stages=max(1, sharing - 1)),
            out_s=None if alone else swizzled((config.rows, ROWS), out_dtype),
            decoded_s=None
            if interpret is None
            else plgpu.SMEM((sharing, deep, ROWS, TILE_K), x.dtype),
            full=plgpu.Barrier(
                num_arrivals=deep if alone else 2 * deep, num_barriers=config.stages
            ),
            free=plgpu.Barrier(num_barriers=config.stages),
            table_ready=plgpu.Barrier(),
            x_ready=plgpu.Barrier(),
            sums_written=plgpu.Barrier(num_arrivals=max(1, sharing - 1)),
            sums_read=plgpu.Barrier(),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=True,
            unsafe_no_auto_barriers=True,  # all that shared memory holds has barriers of its own
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    if alone:
        x = x.reshape(tiles_of_x, ROWS_OF_ONE, length // steps)
    else:
        x = jnp.pad(x, ((0, config.rows - m), (0, 0)))
        if x_exponents is not None:
            x_exponents = jnp.pad(x_exponents, (0, config.rows - m))
    y = call(
        x,
        x_exponents,
        w.groups,
        table,
        w.scales,
        bias,
    )
    return y[:m]
