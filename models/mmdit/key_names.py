"""What checkpoints of MMDiT models call their tensors."""

from collections.abc import Mapping

# Each with a tensor that it alone has. "flux" is what FLUX and an Open-Sora with fused projections
# share; "open-sora" is the release of Open-Sora 2.0, which differs in the projections.
LAYOUTS = {
    "flux": "double_blocks.0.img_attn.qkv.weight",
    "open-sora": "double_blocks.0.img_attn.q_proj.weight",
    "hunyuan": "double_blocks.0.img_attn_qkv.weight",
    "diffusers": "transformer_blocks.0.attn.to_q.weight",
}
COLUMNS = {"flux": 0, "open-sora": 0, "hunyuan": 1, "diffusers": 2}
Name = tuple[str | None, str | None, str | None]  # in each of the COLUMNS
Names = Mapping[str, Name]  # by our module

# "{}" is a block's number; None: no model of this layout has it.
LINEARS: Names = {
    "time/in": (
        "time_in.in_layer",
        "time_in.mlp.0",
        "time_text_embed.timestep_embedder.linear_1",
    ),
    "time/out": (
        "time_in.out_layer",
        "time_in.mlp.2",
        "time_text_embed.timestep_embedder.linear_2",
    ),
    "pooled/in": (
        "vector_in.in_layer",
        "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_1",
    ),
    "pooled/out": (
        "vector_in.out_layer",
        "vector_in.out_layer",
        "time_text_embed.text_embedder.linear_2",
    ),
    "double_blocks/img_mod": (
        "double_blocks.{}.img_mod.lin",
        "double_blocks.{}.img_mod.linear",
        "transformer_blocks.{}.norm1.linear",
    ),
    "double_blocks/txt_mod": (
        "double_blocks.{}.txt_mod.lin",
        "double_blocks.{}.txt_mod.linear",
        "transformer_blocks.{}.norm1_context.linear",
    ),
    "double_blocks/img_attn/o": (
        "double_blocks.{}.img_attn.proj",
        "double_blocks.{}.img_attn_proj",
        "transformer_blocks.{}.attn.to_out.0",
    ),
    "double_blocks/txt_attn/o": (
        "double_blocks.{}.txt_attn.proj",
        "double_blocks.{}.txt_attn_proj",
        "transformer_blocks.{}.attn.to_add_out",
    ),
    "double_blocks/img_mlp/up": (
        "double_blocks.{}.img_mlp.0",
        "double_blocks.{}.img_mlp.fc1",
        "transformer_blocks.{}.ff.net.0.proj",
    ),
    "double_blocks/img_mlp/down": (
        "double_blocks.{}.img_mlp.2",
        "double_blocks.{}.img_mlp.fc2",
        "transformer_blocks.{}.ff.net.2",
    ),
    "double_blocks/txt_mlp/up": (
        "double_blocks.{}.txt_mlp.0",
        "double_blocks.{}.txt_mlp.fc1",
        "transformer_blocks.{}.ff_context.net.0.proj",
    ),
    "double_blocks/txt_mlp/down": (
        "double_blocks.{}.txt_mlp.2",
        "double_blocks.{}.txt_mlp.fc2",
        "transformer_blocks.{}.ff_context.net.2",
    ),
    "single_blocks/mod": (
        "single_blocks.{}.modulation.lin",
        "single_blocks.{}.modulation.linear",
        "single_transformer_blocks.{}.norm.linear",
    ),
    "single_blocks/out": (
        "single_blocks.{}.linear2",
        "single_blocks.{}.linear2",
        "single_transformer_blocks.{}.proj_out",
    ),
}
GUIDANCE: Names = {
    "guidance/in": (
        "guidance_in.in_layer",
        "guidance_in.mlp.0",
        "time_text_embed.guidance_embedder.linear_1",
    ),
    "guidance/out": (
        "guidance_in.out_layer",
        "guidance_in.mlp.2",
        "time_text_embed.guidance_embedder.linear_2",
    ),
}
TEXT: Names = {"txt_in": ("txt_in", None, "context_embedder")}
REFINER: Names = {
    "refiner/time/in": (
        None,
        "txt_in.t_embedder.mlp.0",
        "context_embedder.time_text_embed.timestep_embedder.linear_1",
    ),
    "refiner/time/out": (
        None,
        "txt_in.t_embedder.mlp.2",
        "context_embedder.time_text_embed.timestep_embedder.linear_2",
    ),
    "refiner/pooled/in": (
        None,
        "txt_in.c_embedder.linear_1",
        "context_embedder.time_text_embed.text_embedder.linear_1",
    ),
    "refiner/pooled/out": (
        None,
        "txt_in.c_embedder.linear_2",
        "context_embedder.time_text_embed.text_embedder.linear_2",
    ),
    "refiner/text_in": (None, "txt_in.input_embedder", "context_embedder.proj_in"),
    "refiner/layers/gates": (
        None,
        "txt_in.individual_token_refiner.blocks.{}.adaLN_modulation.1",
        "context_embedder.token_refiner.refiner_blocks.{}.norm_out.linear",
    ),
    "refiner/layers/o": (
        None,
        "txt_in.individual_token_refiner.blocks.{}.self_attn_proj",
        "context_embedder.token_refiner.refiner_blocks.{}.attn.to_out.0",
    ),
    "refiner/layers/up": (
        None,
        "txt_in.individual_token_refiner.blocks.{}.mlp.fc1",
        "context_embedder.token_refiner.refiner_blocks.{}.ff.net.0.proj",
    ),
    "refiner/layers/down": (
        None,
        "txt_in.individual_token_refiner.blocks.{}.mlp.fc2",
        "context_embedder.token_refiner.refiner_blocks.{}.ff.net.2",
    ),
}
REFINER_NORMS: Names = {
    f"refiner/layers/{norm}": (
        None,
        f"txt_in.individual_token_refiner.blocks.{{}}.{norm}",
        f"context_embedder.token_refiner.refiner_blocks.{{}}.{norm}",
    )
    for norm in ("norm1", "norm2")
}
HEAD_NORMS: Names = {
    "double_blocks/img_attn/norm_q": (
        "double_blocks.{}.img_attn.norm.query_norm.scale",
        "double_blocks.{}.img_attn_q_norm.weight",
        "transformer_blocks.{}.attn.norm_q.weight",
    ),
    "double_blocks/img_attn/norm_k": (
        "double_blocks.{}.img_attn.norm.key_norm.scale",
        "double_blocks.{}.img_attn_k_norm.weight",
        "transformer_blocks.{}.attn.norm_k.weight",
    ),
    "double_blocks/txt_attn/norm_q": (
        "double_blocks.{}.txt_attn.norm.query_norm.scale",
        "double_blocks.{}.txt_attn_q_norm.weight",
        "transformer_blocks.{}.attn.norm_added_q.weight",
    ),
    "double_blocks/txt_attn/norm_k": (
        "double_blocks.{}.txt_attn.norm.key_norm.scale",
        "double_blocks.{}.txt_attn_k_norm.weight",
        "transformer_blocks.{}.attn.norm_added_k.weight",
    ),
    "single_blocks/norm_q": (
        "single_blocks.{}.norm.query_norm.scale",
        "single_blocks.{}.q_norm.weight",
        "single_transformer_blocks.{}.attn.norm_q.weight",
    ),
    "single_blocks/norm_k": (
        "single_blocks.{}.norm.key_norm.scale",
        "single_blocks.{}.k_norm.weight",
        "single_transformer_blocks.{}.attn.norm_k.weight",
    ),
}
LINEAR: Name = ("img_in", "img_in", "x_embedder")  # on patches: FLUX
CONVOLUTION: Name = ("img_in.proj", "img_in.proj", "x_embedder.proj")  # likewise: HunyuanVideo
COND: Name = ("cond_in", None, None)
HEAD: Name = ("final_layer.linear", "final_layer.linear", "proj_out")
HEAD_MODULATION: Name = (
    "final_layer.adaLN_modulation.1",
    "final_layer.adaLN_modulation.1",
    "norm_out.linear",  # halves swapped
)
# By layout, tensors with the rows of one or several of our linears, in this order; all of these but
# the last have D rows.
_IMG, _TXT, _SINGLE = "double_blocks/img_attn", "double_blocks/txt_attn", "single_blocks"
PROJECTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "flux": {
        "double_blocks.{}.img_attn.qkv": (f"{_IMG}/q", f"{_IMG}/k", f"{_IMG}/v"),
        "double_blocks.{}.txt_attn.qkv": (f"{_TXT}/q", f"{_TXT}/k", f"{_TXT}/v"),
        "single_blocks.{}.linear1": tuple(f"{_SINGLE}/{name}" for name in ("q", "k", "v", "up")),
    },
    "open-sora": {
        **{f"double_blocks.{{}}.img_attn.{name}_proj": (f"{_IMG}/{name}",) for name in "qkv"},
        **{f"double_blocks.{{}}.txt_attn.{name}_proj": (f"{_TXT}/{name}",) for name in "qkv"},
        "single_blocks.{}.q_proj": (f"{_SINGLE}/q",),
        "single_blocks.{}.k_proj": (f"{_SINGLE}/k",),
        "single_blocks.{}.v_mlp": (f"{_SINGLE}/v", f"{_SINGLE}/up"),
    },
    "hunyuan": {
        "double_blocks.{}.img_attn_qkv": (f"{_IMG}/q", f"{_IMG}/k", f"{_IMG}/v"),
        "double_blocks.{}.txt_attn_qkv": (f"{_TXT}/q", f"{_TXT}/k", f"{_TXT}/v"),
        "single_blocks.{}.linear1": tuple(f"{_SINGLE}/{name}" for name in ("q", "k", "v", "up")),
    },
    "diffusers": {
        **{f"transformer_blocks.{{}}.attn.to_{name}": (f"{_IMG}/{name}",) for name in "qkv"},
        **{f"transformer_blocks.{{}}.attn.add_{name}_proj": (f"{_TXT}/{name}",) for name in "qkv"},
        **{
            f"single_transformer_blocks.{{}}.attn.to_{name}": (f"{_SINGLE}/{name}",)
            for name in "qkv"
        },
        "single_transformer_blocks.{}.proj_mlp": (f"{_SINGLE}/up",),
    },
}
REFINER_PROJECTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "hunyuan": {
        "txt_in.individual_token_refiner.blocks.{}.self_attn_qkv": tuple(
            f"refiner/layers/{name}" for name in "qkv"
        ),
    },
    "diffusers": {
        f"context_embedder.token_refiner.refiner_blocks.{{}}.attn.to_{name}": (
            f"refiner/layers/{name}",
        )
        for name in "qkv"
    },
}
