"""A program of `ptx.Program` as the body of a Pallas kernel."""

from typing import Any

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm


def run(text: str, *refs: Any, shared: Any = None) -> None:
    """Its arguments $0, $1, ... are the refs' addresses, of 64 bits, and shared memory's, of 32."""
    inside = () if shared is None else (shared,)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(refs) + len(inside)))
    def body(_, *all):
        bits = [64] * len(refs) + [32] * len(inside)
        addresses = [
            llvm.ptrtoint(ir.IntegerType.get_signless(size), utils.memref_ptr(ref))
            for size, ref in zip(bits, all, strict=True)
        ]
        constraints = "l," * len(refs) + "r," * len(inside) + "~{memory}"
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, addresses, text, constraints, has_side_effects=True)

    body(*refs, *inside)
