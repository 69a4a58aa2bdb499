"""Where the blocks of a Wan quantise inputs, and which kernels read them there."""

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
