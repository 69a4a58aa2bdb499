"""The linears of the video models that the kernels are for, at the lengths that they sample."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """m tokens times a kernel of k inputs and n outputs.

    Attributes:
      model: whose.
      name: of the linear, or of those that read one input together.
      m, k, n: sizes.
    """

    model: str
    name: str
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.model} {self.name}, {self.m} tokens"

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.k * self.n


def _block(model: str, tokens: int, width: int, hidden: int, qkv: str = "q, k, v") -> list[Linear]:
    sizes = (
        ("q or o", width, width),
        (qkv, width, 3 * width),
        ("ffn up", width, hidden),
        ("ffn down", hidden, width),
    )
    return [Linear(model=model, name=name, m=tokens, k=k, n=n) for name, k, n in sizes]


LINEARS = (
    *_block("Wan 14B", 32760, 5120, 13824),
    *_block("Wan 14B", 4096, 5120, 13824),
    *_block("Wan 1.3B", 32760, 1536, 8960),
    *_block("Open-Sora 2.0", 76544, 3072, 12288),
    *_block("HunyuanVideo", 119056, 3072, 12288),
    *(
        Linear(model="Wan 14B", name="modulation or text", m=m, k=5120, n=5120)
        for m in (1, 16, 64, 512)
    ),
)
