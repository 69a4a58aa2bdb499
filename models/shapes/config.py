"""The size of the shapes model: a small Wan with a learned caption encoder."""

import dataclasses

from models.wan.config import WanConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShapesConfig:
    """A Wan over pixels.

    Attributes:
      dit: the transformer. It predicts the clean video, because a token's 384 pixels would not
        pass as noise through a width of 256.
      sigma_floor: where the velocity (x - x0) / sigma stops growing.
    """

    dit: WanConfig
    sigma_floor: float = 0.05


CONFIG = ShapesConfig(
    dit=WanConfig(
        width=256,
        heads=4,
        layers=8,
        ffn_width=1024,
        in_channels=3,
        out_channels=3,
        patch=(2, 8, 8),
        text_width=128,
    )
)
