"""Sizes of the Wan transformers."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WanConfig:
    """One size of the Wan transformer.

    Attributes:
      width: D.
      heads: attention heads; D / heads is a head's width.
      layers: transformer blocks.
      ffn_width: hidden width of the feed-forward network.
      in_channels: channels of the input video, conditions concatenated.
      out_channels: channels of the prediction.
      patch: pixels of a token along (t, h, w).
      text_width: channels of the text embeddings.
      time_width: channels of the timestep's sinusoid.
      image_width: channels of the image embeddings, None without image cross-attention.
      eps: of every norm but the image embedding's.
      rope_theta: base of the rotary frequencies.
    """

    width: int
    heads: int
    layers: int
    ffn_width: int
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text_width: int = 4096
    time_width: int = 256
    image_width: int | None = None
    eps: float = 1e-6
    rope_theta: float = 1e4

    def __post_init__(self):
        if self.width % self.heads or self.head_width % 2:
            raise ValueError(
                f"width {self.width} must be a multiple of twice the {self.heads} heads"
            )

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    def grid(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along (t, h, w) of a video of this (T, H, W)."""
        t, h, w = size
        pt, ph, pw = self.patch
        return t // pt, h // ph, w // pw

    @property
    def rope_widths(self) -> tuple[int, int, int]:
        """How a head's channels are split over (t, h, w)."""
        side = 2 * (self.head_width // 6)
        return self.head_width - 2 * side, side, side


_14B = WanConfig(width=5120, heads=40, layers=40, ffn_width=13824)

SIZES = {
    "wan2.1-t2v-1.3b": WanConfig(width=1536, heads=12, layers=30, ffn_width=8960),
    "wan2.1-t2v-14b": _14B,
    "wan2.1-i2v-14b": dataclasses.replace(_14B, in_channels=36, image_width=1280),
    "wan2.2-t2v-a14b": _14B,  # each of the two experts
    "wan2.2-i2v-a14b": dataclasses.replace(_14B, in_channels=36),  # each of the two experts
    "wan2.2-ti2v-5b": WanConfig(
        width=3072, heads=24, layers=30, ffn_width=14336, in_channels=48, out_channels=48
    ),
}
