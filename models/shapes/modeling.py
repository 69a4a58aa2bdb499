"""The shapes model: caption tokens -> embeddings -> Wan -> clean video.

Videos are `[B, 16, 64, 64, 3]` in [-1, 1] here; noise has unit variance.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.common.layers import Ops
from models.shapes.config import ShapesConfig
from models.shapes.vocabulary import CAPTION_TOKENS, VOCABULARY
from models.wan.modeling import Wan


class Shapes(nn.Module):
    """Predicts the clean video x0 from a noisy one."""

    config: ShapesConfig
    ops: Ops = Ops()
    dtype: Any = jnp.bfloat16
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, sigma: jax.Array, tokens: jax.Array, state: Any = None
    ) -> jax.Array | tuple[jax.Array, Any]:
        """Run the network.

        Args:
          x: noisy videos `[B, T, H, W, 3]`.
          sigma: noise levels in [0, 1], `[B]`.
          tokens: captions int32 `[B, CAPTION_TOKENS]`.
          state: what `ops.quantizer` remembers, stacked over the blocks.
        Returns:
          x0, float32, in x's shape; with a state, that and the new state.
        """
        text = CaptionEncoder(self.config.dit.text_width, name="caption")(tokens)
        dit = Wan(self.config.dit, self.ops, self.dtype, self.remat, name="dit")
        return dit(x, 1000 * sigma, text, state=state)


class CaptionEncoder(nn.Module):
    """A learned vector for each word plus one for its place: the grammar has fixed slots."""

    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 `[B, CAPTION_TOKENS]` -> float32 `[B, CAPTION_TOKENS, width]`."""
        normal = nn.initializers.normal(1.0)
        words = self.param("words", normal, (len(VOCABULARY), self.width))
        places = self.param("places", normal, (CAPTION_TOKENS, self.width))
        embedded = words[tokens].astype(jnp.float32)
        return embedded + places.astype(jnp.float32)[None]
