"""Sizes of the double- and single-stream transformers (MMDiT)."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MMDiTConfig:
    """One size of the transformer.

    Attributes:
      width: D.
      heads: attention heads; D / heads is a head's width.
      double_blocks: blocks with weights of their own for video and text.
      single_blocks: blocks with the same weights for both, after those.
      mlp_width: hidden width of the feed-forward networks.
      in_channels: channels of the input video.
      out_channels: channels of the prediction.
      cond_channels: channels of a video that conditions the prediction, None without.
      patch: pixels of a token along (t, h, w).
      text_width: channels of the text embeddings.
      pooled_width: channels of the embedding of the whole text.
      time_width: channels of the timestep's sinusoid.
      refiner_blocks: of the network that reads the text first; 0: a linear reads it.
      guidance: whether the scale of guidance is an input.
      text_first: whether the text's tokens come before the video's, or after.
      rope_widths: how a head's channels are split over (t, h, w).
      rope_theta: base of the rotary frequencies.
      eps: of every norm.
    """

    width: int
    heads: int
    double_blocks: int
    single_blocks: int
    mlp_width: int
    in_channels: int = 16
    out_channels: int = 16
    cond_channels: int | None = None
    patch: tuple[int, int, int] = (1, 2, 2)
    text_width: int = 4096
    pooled_width: int = 768
    time_width: int = 256
    refiner_blocks: int = 0
    guidance: bool = False
    text_first: bool = True
    rope_widths: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 1e4
    eps: float = 1e-6

    def __post_init__(self):
        if self.width % self.heads or any(width % 2 for width in self.rope_widths):
            raise ValueError(
                f"width {self.width} must be a multiple of the {self.heads} heads, "
                f"rope_widths even, got {list(self.rope_widths)}"
            )
        if sum(self.rope_widths) != self.head_width:
            raise ValueError(
                f"rope_widths: expected a sum of {self.head_width}, a head's width, "
                f"got {list(self.rope_widths)}"
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


SIZES = {
    "open-sora-2.0": MMDiTConfig(
        width=3072,
        heads=24,
        double_blocks=19,
        single_blocks=38,
        mlp_width=12288,
        cond_channels=17,  # a mask, then the latents that it keeps
    ),
    "hunyuanvideo": MMDiTConfig(
        width=3072,
        heads=24,
        double_blocks=20,
        single_blocks=40,
        mlp_width=12288,
        refiner_blocks=2,
        guidance=True,
        text_first=False,
        rope_theta=256.0,
    ),
}
