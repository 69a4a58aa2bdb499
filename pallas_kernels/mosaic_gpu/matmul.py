"""The matmul of 4-bit weights and fp8 or bf16 rows on Hopper's tensor cores.

out^T = W x^T, a tile of `tile_n` weight rows by `tile_m` rows of x at a time. One warpgroup copies
operands into shared memory, a ring of `stages` slots that never drains between tiles; the others
decode their part of the weight tile into registers and multiply. The weights of the next slot are
decoded while the tensor cores work on this one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import products, products_plain
from pallas_kernels.mosaic_gpu.config import (
    PRODUCER_REGISTERS,
    ROWS,
    TILE_K,
    Config,
    consumer_registers,
)
from pallas_kernels.mosaic_gpu.decode import add_signs, decode_magnitudes, decoded, places
from pallas_kernels.mosaic_gpu.epilogue import (
    BY_W,
    BY_X,
    added,
    finished,
    load_transposed,
    store_transposed,
)
from pallas_kernels.mosaic_gpu.memory import (
    by_warps,
    copy_as_it_lies,
    following,
    free_barrier,
    load,
    preceding,
    swizzled,
)
from pallas_kernels.mosaic_gpu.operands import TiledWeight
from pallas_kernels.mosaic_gpu.products import accumulator_layout
from pallas_kernels.mosaic_gpu.tables import look_up_table
from pallas_kernels.rows import row_scales


@functools.partial(
    jax.jit, static_argnames=("activation", "config", "out_dtype", "num_sms", "interpret")
)
def matmul(
    x: jax.Array,
    x_exponents: jax.Array | None,
    w: TiledWeight,
    bias: jax.Array | None,
    onto: tuple[jax.Array, jax.Array] | None = None,
    *,
    activation: Callable[[jax.Array], jax.Array],
    config: Config,
    out_dtype: Any,
    num_sms: int,
    interpret: Any = None,
) -> jax.Array:
    """activation((x 2^x_exponents) w^T + bias), and onto + gate times that.

    Args:
      x: e4m3 or bf16 `[M, K]`, interleaved; whole tiles, as w.
      x_exponents: int8 `[M]`, of the rows; None: all zero.
      w: the weight, of N rows with those that fill the last tile.
      bias: float32 `[N]`, or None.
      onto: `[M, N]` of out_dtype, 16 bits a number, whose place the result takes, and its gate,
        float32 `[N]`; or None.
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
    if onto is not None and jnp.dtype(out_dtype).itemsize != 2:
        raise ValueError(f"onto: expected 16 bits a number, got {out_dtype}")
    m, _ = x.shape
    n = w.rows
    table = jnp.asarray(look_up_table(w.format, x.dtype)).reshape(-1, 128)
    tiles_m, tiles_n = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n * config.cluster)
    steps, groups, size = w.groups.shape
    at_once = config.pieces_at_once(jnp.dtype(out_dtype).itemsize)
    first_pieces = min(at_once, config.pieces)  # of what is added to, fetched before the products
    x_scales = -(-config.tile_m // 32) * 32  # copies are whole multiples of 128 bytes
    multiply: Any = products if interpret is None else products_plain

    def kernel(
        x_g, xs_g, w_g, table_g, ws_g, bias_g, gate_g, out_g,
        x_s, w_s, table_s, xs_s, ws_s, bias_s, gate_s, out_s, decoded_s,
        full, free, table_ready, scales_ready, onto_ready,
    ):  # fmt: skip
        group = lax.axis_index("warpgroup")
        peer = lax.axis_index("peer")
        first = lax.axis_index("block")
        blocks = lax.axis_size("block")
        own = lax.div(tiles_m * tiles_n - first + blocks - 1, blocks)

        def place(turn):
            """Of this block's turn-th tile: its first row of x and its first row of w."""
            tile_m, tile_n = snake(first + turn * blocks, tiles_m, tiles_n, config.width)
            return tile_m * config.tile_m, (tile_n * config.cluster + peer) * config.tile_n

        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def fill(slot, filled, at_m, at_n, k):
                # Signals are of the slot before; the first one of the last, which nobody filled.
                @pl.when(filled >= config.stages - 1)
                def wait_until_read():
                    plgpu.barrier_wait(free.at[slot])

                barrier = full.at[slot]
                plgpu.copy_gmem_to_smem(
                    x_g.at[pl.ds(at_m, config.tile_m), pl.ds(k * TILE_K, TILE_K)],
                    x_s.at[slot],
                    barrier,
                    collective_axes="peer" if config.cluster > 1 else None,
                )
                # The last may be half there; of what is not, no column is stored.
                first_group = lax.min(lax.div(at_n, ROWS), groups - 1)
                of_w = w_g.at[k, pl.ds(first_group, config.warpgroups)]
                copy_as_it_lies(of_w, w_s.at[slot], barrier)

            def tile(turn, slot):
                at_m, at_n = place(turn)

                def step(k, slot):
                    fill(slot, turn * steps + k, at_m, at_n, k)
                    return following(slot, config.stages)

                return lax.fori_loop(0, steps, step, slot)

            def fill_all():
                slot, total = lax.fori_loop(0, own, tile, 0), own * steps
                at_m, at_n = place(own)
                fill(slot, total, at_m, at_n, 0)  # the last is decoded, never multiplied

                # A block must not leave while its peer still signals to it.
                def drain(_, slot):
                    plgpu.barrier_wait(free.at[slot])
                    return following(slot, config.stages)

                last = config.stages - 1
                few = total < last
                left = jnp.where(few, total + 1, last)
                lax.fori_loop(0, left, drain, jnp.where(few, last, following(slot, config.stages)))

            by_warps(fill_all)

        def consume():
            plgpu.set_max_registers(consumer_registers(config.warpgroups), action="increase")

            @pl.when(group == 0)
            def fetch_table():
                plgpu.copy_gmem_to_smem(table_g, table_s, table_ready)

            plgpu.barrier_wait(table_ready)
            words_at: Any = places() if interpret is None else None

            def weights(slot):
                """Of a slot, once it is full: magnitudes and words, or interpreted all at once."""
                plgpu.barrier_wait(full.at[slot])
                if interpret is not None:
                    return decoded(w_s[slot, group], table_s[...], dtype=x.dtype)
                of_w = w_s.at[slot, group]
                return decode_magnitudes(of_w, table_s, words_at, halves=w.halves, dtype=x.dtype)

            def operand(held):
                """Of `wgmma`."""
                if interpret is None:
                    return add_signs(*held)
                decoded_s[group] = held
                plgpu.commit_smem()
                return decoded_s.at[group]

            def multiplied(slot, held, onto=None):
                """The product of a slot, the next slot, and its weights, decoded meanwhile."""
                product = multiply.begin(operand(held), x_s.at[slot], onto=onto)
                plgpu.barrier_arrive(free.at[preceding(slot, config.stages)])  # nobody waits now
                then = following(slot, config.stages)
                held = weights(then)
                (product,) = multiply.arrived(product, pending=0)
                return product, then, held

            def summed(first, last, slot, held):
                """What the tensor cores sum up: the products of some slots of a tile."""

                def add(_, state):
                    product, slot, held = state
                    return multiplied(slot, held, onto=product)

                return lax.fori_loop(first + 1, last, add, multiplied(slot, held))

            def promoted(slot, held):
                """Float32 sums of what the tensor cores sum up, a few slots at a time."""

                def add(number, state):
                    total, slot, held = state
                    first = number * config.promote
                    last = lax.min(first + config.promote, steps)
                    product, slot, held = summed(first, last, slot, held)
                    return total + product, slot, held

                zeros = jnp.zeros((ROWS, config.tile_m), jnp.float32)
                zeros = plgpu.layout_cast(zeros, accumulator_layout())
                return lax.fori_loop(0, pl.cdiv(steps, config.promote), add, (zeros, slot, held))

            def tile(turn, state):
                fetch_scales(turn)
                if config.promote:
                    total, *state = promoted(*state)
                else:
                    total, *state = summed(0, steps, *state)
                store(total, turn)
                return tuple(state)

            def fetch_scales(turn):
                """What `store` needs, so that it does not wait for it."""
                here = scales_ready.at[group]
                at_m, at_n = place(turn)
                at_n = at_n + group * ROWS
                for of, to, at, count in (
                    (xs_g, xs_s, at_m, x_scales),
                    (ws_g, ws_s, at_n, ROWS),
                    (bias_g, bias_s, at_n, ROWS),
                    (gate_g, gate_s, at_n, ROWS),
                ):
                    if of is not None:
                        plgpu.copy_gmem_to_smem(of.at[pl.ds(at, count)], to.at[group], here)
                if onto is not None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for number in range(first_pieces):
                        fetch_onto(turn, number, here)

            def fetch_onto(turn, number, ready):
                """A piece of what is added to, to where the result will be."""
                at_m, at_n = place(turn)
                at, rows = config.cuts[number]
                of = out_g.at[pl.ds(at_m + at, rows), pl.ds(at_n + group * ROWS, ROWS)]
                to = out_s.at[group, number % at_once, pl.ds(0, rows)]
                plgpu.copy_gmem_to_smem(of, to, ready)

            def store(total, turn):
                """Scale, add the bias and send a warpgroup's result out, piece by piece."""
                total = multiply.in_pairs(total)
                plgpu.barrier_wait(scales_ready.at[group])
                at_m, at_n = place(turn)
                of_n = pl.ds(at_n + group * ROWS, ROWS)
                w_scale, bias = load(ws_s.at[group], BY_W), load(bias_s.at[group], BY_W)
                gate = None if onto is None else load(gate_s.at[group], BY_W)
                for number, (at, rows) in enumerate(config.cuts):
                    piece = total[:, at : at + rows]
                    x_scale = load(xs_s.at[group, pl.ds(at, rows)], BY_X)
                    y = finished(piece, x_scale, w_scale, bias, activation)
                    if gate is None:
                        slot = lax.rem(turn * config.pieces + number, at_once)
                        here = out_s.at[group, slot, pl.ds(0, rows)]
                        plgpu.wait_smem_to_gmem(at_once - 1, wait_read_only=True)
                    else:
                        here = out_s.at[group, number % at_once, pl.ds(0, rows)]
                        if number >= first_pieces:
                            plgpu.barrier_wait(onto_ready.at[group])
                        y = added(load_transposed(here), y, gate)
                    store_transposed(here, y.astype(out_dtype))
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(here, out_g.at[pl.ds(at_m + at, rows), of_n])
                    later = number - 1 + at_once  # goes where the piece before this one was
                    if gate is not None and first_pieces <= later < config.pieces:
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        fetch_onto(turn, later, onto_ready.at[group])

            slot, _ = lax.fori_loop(0, own, tile, (0, weights(0)))
            plgpu.barrier_arrive(free.at[preceding(slot, config.stages)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(group == config.warpgroups, produce, consume)

    ring = functools.partial(swizzled, stages=config.stages)
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), out_dtype) if onto is None else (),
        grid=(num_sms // config.cluster,),
        grid_names=("block",),
        cluster=(config.cluster,),
        cluster_names=("peer",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=dict[str, Any](
            x_s=ring((config.tile_m, TILE_K), x.dtype),
            w_s=plgpu.SMEM((config.stages, config.warpgroups, size), jnp.uint32),
            table_s=plgpu.SMEM(table.shape, jnp.uint32),
            xs_s=plgpu.SMEM((config.warpgroups, x_scales), jnp.float32),
            ws_s=plgpu.SMEM((config.warpgroups, ROWS), jnp.float32),
            bias_s=plgpu.SMEM((config.warpgroups, ROWS), jnp.float32),
            gate_s=None if onto is None else plgpu.SMEM((config.warpgroups, ROWS), jnp.float32),
            decoded_s=None
            if interpret is None
            else plgpu.SMEM((config.warpgroups, ROWS, TILE_K), x.dtype),
            out_s=swizzled((at_once, config.piece, ROWS), out_dtype, stages=config.warpgroups),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            free=free_barrier(
                readers=config.warpgroups, stages=config.stages, cluster=config.cluster
            ),
            table_ready=plgpu.Barrier(),
            scales_ready=plgpu.Barrier(
                num_arrivals=3 if onto is None else 4 + first_pieces,
                num_barriers=config.warpgroups,
            ),
            onto_ready=plgpu.Barrier(num_barriers=config.warpgroups),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=True,
            unsafe_no_auto_barriers=True,  # all that shared memory holds has barriers of its own
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    scales = jnp.ones(m) if x_exponents is None else row_scales(x_exponents, bad=1.0)
    operands = (
        x,
        _padded(scales, config.tile_m, x_scales - config.tile_m),
        w.groups,
        table,
        _padded(w.scales, config.tile_n * config.cluster),
        _padded(jnp.zeros(n) if bias is None else bias, config.tile_n * config.cluster),
        None if onto is None else _padded(onto[1], config.tile_n * config.cluster),
    )
    if onto is None:
        return call(*operands)
    there = jax.new_ref(onto[0])  # without a copy, if nobody else needs what it holds
    call(*operands, there)
    return jax.freeze(there)


def snake(number: jax.Array, tiles_m: int, tiles_n: int, width: int) -> tuple[Any, Any]:
    """Place of a tile: strips of `width` along M, down one along N and up the next.

    As `plgpu.planar_snake`, but divides by nothing that is known only at run time: such a division
    is a call, with which ptxas 13.5 ignores `set_max_registers` and serialises `wgmma`.
    """
    strip = lax.div(number, width * tiles_n)
    inside = number - strip * (width * tiles_n)
    # Of a power of two a shift, so that the two divisions do not become one, by a choice of two.
    down = lax.shift_right_logical(inside, width.bit_length() - 1)
    across = inside - down * width
    if narrow := tiles_m % width:
        is_last = strip == tiles_m // width
        down = jnp.where(is_last, lax.div(inside, narrow), down)
        across = jnp.where(is_last, lax.rem(inside, narrow), across)
    return strip * width + across, jnp.where(strip % 2 == 0, down, tiles_n - 1 - down)


def _padded(x: jax.Array, to: int, more: int = 0) -> jax.Array:
    return jnp.pad(x, (0, -x.shape[0] % to + more))
