"""What Hopper kernels agree on about memory.

Swizzled tiles, rings of them and the warps that fill them, plain loads and stores.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def swizzled(shape: tuple[int, ...], dtype: Any, *, stages: int | None = None) -> Any:
    """Shared memory `shape` or `[stages, *shape]`, in the order that TMA and `wgmma` agree on."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
    lead = () if stages is None else (stages,)
    return plgpu.SMEM((*lead, *shape), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def free_barrier(*, readers: int, stages: int, cluster: int) -> Any:
    """Signals that all readers of a slot are done with it, in both blocks if they share it."""
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=readers, num_barriers=stages)
    return plgpu.ClusterBarrier(
        collective_axes=("peer",), num_arrivals=readers, num_barriers=stages
    )


def copy_as_it_lies(of: Any, to: Any, barrier: Any) -> None:
    """Global memory that lies together to shared memory: no tensor map, of any length.

    What is behind the last of it stays undefined.
    """
    plgpu.copy_gmem_to_smem(of, to, barrier, oob_mode=plgpu.OOBFillMode.UNDEFINED)


def by_warps(*parts: Callable[[], None]) -> None:
    """Each part by one warp of this warpgroup, side by side; the other warps are done.

    A warp that only waits for barriers takes turns from those that compute.
    """

    @pl.kernel(mesh=plgpu.WarpMesh(axis_name="warp"))
    def run():
        for warp, part in enumerate(parts):
            pl.when(lax.axis_index("warp") == warp)(part)

    run()


def following(slot: jax.Array, stages: int) -> jax.Array:
    """The next slot of a ring; a remainder would take longer."""
    return jnp.where(slot + 1 == stages, 0, slot + 1)


def preceding(slot: jax.Array, stages: int) -> jax.Array:
    """The slot before."""
    return jnp.where(slot == 0, stages - 1, slot - 1)


def load(ref: Any, layout: Any) -> jax.Array:
    """Into registers; `optimized` would insist on the fastest path that Mosaic knows."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # jax < 0.11


def store(ref: Any, y: jax.Array) -> None:
    """To global memory, each thread what it has: for so little that a copy would take longer."""
    # From jax 0.12 on, where `=` insists on wide stores.
    if simple := getattr(plgpu, "store", None):
        simple(ref, y, optimized=False)
    else:
        ref[...] = y
