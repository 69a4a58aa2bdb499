"""Where the blocks of a Wan quantise inputs, and which kernels read them there."""

from models.wan.config import WanConfig

VIDEO_SITES = {
    "blocks/self_attn/qkv": ("self_attn/q", "self_attn/k", "self_attn/v"),
    "blocks/self_attn/o": ("self_attn/o",),
    "blocks/cross_attn/q": ("cross_attn/q",),
    "blocks/cross_attn/o": ("cross_attn/o",),
    "blocks/ffn/up": ("ffn/up",),
    "blocks/ffn/down": ("ffn/down",),
}
TEXT_SITES = {"blocks/cross_attn/kv": ("cross_attn/k", "cross_attn/v")}
SITES = {**VIDEO_SITES, **TEXT_SITES}


def video_inputs(config: WanConfig) -> tuple[tuple[str, int], ...]:
    """The sites of the video's tokens, each with the width of its inputs."""
    return tuple(
        (site, config.ffn_width if site == "blocks/ffn/down" else config.width)
        for site in VIDEO_SITES
    )
