"""Where the blocks of an MMDiT quantise inputs, and which kernels read them there."""

from models.mmdit.config import MMDiTConfig

VIDEO_SITES = {
    "double_blocks/img_attn/qkv": ("img_attn/q", "img_attn/k", "img_attn/v"),
    "double_blocks/img_attn/o": ("img_attn/o",),
    "double_blocks/img_mlp/up": ("img_mlp/up",),
    "double_blocks/img_mlp/down": ("img_mlp/down",),
}
TEXT_SITES = {
    "double_blocks/txt_attn/qkv": ("txt_attn/q", "txt_attn/k", "txt_attn/v"),
    "double_blocks/txt_attn/o": ("txt_attn/o",),
    "double_blocks/txt_mlp/up": ("txt_mlp/up",),
    "double_blocks/txt_mlp/down": ("txt_mlp/down",),
}
# One vector of each video, that of its timestep and text; a third of the weights.
DOUBLE_MODULATION = {"double_blocks/modulation": ("img_mod", "txt_mod")}
SINGLE_MODULATION = {"single_blocks/modulation": ("mod",)}
DOUBLE_SITES = {**VIDEO_SITES, **TEXT_SITES, **DOUBLE_MODULATION}
# Tokens of text and video in one sequence.
SINGLE_SITES = {
    "single_blocks/qkv_up": ("q", "k", "v", "up"),
    "single_blocks/out": ("out",),
    **SINGLE_MODULATION,
}
SITES = {**DOUBLE_SITES, **SINGLE_SITES}


def video_inputs(config: MMDiTConfig) -> tuple[tuple[str, int], ...]:
    """The sites whose inputs are the video's tokens alone, each with the inputs' width."""
    return tuple(
        (site, config.mlp_width if site == "double_blocks/img_mlp/down" else config.width)
        for site in VIDEO_SITES
    )
