"""The layers of the networks of diffusion, as their own code and as diffusers name them.

Trainers of LoRA name a layer by its path in the network that they train: kohya's by that of the network's own code
(but diffusers' for Stable Diffusion's U-Net and for Qwen-Image), OneTrainer and diffusers by that of diffusers. A row
is a path; # is a number, and braces hold alternatives.
"""
from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

_ATTENTION = "{to_q,to_k,to_v,to_out.#}"
_JOINT = "{to_q,to_k,to_v,to_out.#,add_q_proj,add_k_proj,add_v_proj,to_add_out}"
_FEED = "net.{#,#.proj}"
_UNET_BLOCKS = "{down_blocks.#,mid_block,up_blocks.#}"
_SGM_BLOCKS = "{input_blocks.#.#,middle_block.#,output_blocks.#.#}"
_TRANSFORMER = (f"transformer_blocks.#.{{attn1,attn2}}.{_ATTENTION}", f"transformer_blocks.#.ff.{_FEED}",
                "transformer_blocks.#.{norm1,norm2,norm3}", "{proj_in,proj_out,norm}")
_RESIDUAL = "{in_layers.#,out_layers.#,emb_layers.#,skip_connection,op,conv}"
_DIFFUSERS_TIME = "time_text_embed.{timestep_embedder,text_embedder,guidance_embedder}.{linear_1,linear_2}"
_DIFFUSERS_JOINT = (
    f"transformer_blocks.#.{{attn,attn2}}.{_JOINT}", f"transformer_blocks.#.{{ff,ff_context}}.{_FEED}",
    "transformer_blocks.#.{norm1,norm1_context}.linear", "norm_out.linear", "{proj_out,context_embedder}",
    f"single_transformer_blocks.#.attn.{_ATTENTION}", "single_transformer_blocks.#.{norm.linear,proj_mlp,proj_out}",
    _DIFFUSERS_TIME)
_IN_OUT = "{in_layer,out_layer}"
_SINGLES = "single_blocks.#.{linear1,linear2}"
_LAST = "final_layer.{linear,adaLN_modulation.#}"
_LLAMA = "layers.#.{self_attn.{q_proj,k_proj,v_proj,o_proj},mlp.{gate_proj,up_proj,down_proj}}"

# By network; two rows of one network may say the same.
NETWORKS: dict[str, tuple[str, ...]] = {
    "Stable Diffusion's U-Net in diffusers": (
        *(f"{_UNET_BLOCKS}.{{attentions.#,motion_modules.#}}.{row}" for row in _TRANSFORMER),
        f"{_UNET_BLOCKS}.attentions.#.{{to_q,to_k,to_v,to_out.#,group_norm}}",
        f"{_UNET_BLOCKS}.resnets.#.{{conv1,conv2,conv_shortcut,time_emb_proj,norm1,norm2}}",
        f"{_UNET_BLOCKS}.{{downsamplers.#,upsamplers.#}}.conv", "{conv_in,conv_out,conv_norm_out}",
        "{time_embedding,add_embedding,class_embedding}.{linear_1,linear_2}"),
    "Stable Diffusion's U-Net": (
        *(f"{_SGM_BLOCKS}.{row}" for row in (*_TRANSFORMER, _RESIDUAL)), "input_blocks.#.#", "time_embed.#",
        "label_emb.#.#", "out.#"),
    "CLIP": (
        "{text_model.,}encoder.layers.#.{self_attn.{q_proj,k_proj,v_proj,out_proj},mlp.{fc1,fc2},layer_norm1,"
        "layer_norm2}", "{text_model.,}embeddings.{token_embedding,position_embedding}",
        "{text_model.,}final_layer_norm", "text_projection"),
    "T5": ("encoder.block.#.layer.#.{SelfAttention.{q,k,v,o},DenseReluDense.{wi,wi_0,wi_1,wo}}",),
    "a language model": (f"{{model.,}}{_LLAMA}", f"model.language_model.{_LLAMA}"),
    "FLUX": (
        "double_blocks.#.{img_attn,txt_attn}.{qkv,proj}", "double_blocks.#.{img_mlp,txt_mlp}.#",
        "double_blocks.#.{img_mod,txt_mod}.lin", _SINGLES, "single_blocks.#.modulation.lin", "{img_in,txt_in}",
        f"{{time_in,vector_in,guidance_in}}.{_IN_OUT}", _LAST,
        f"distilled_guidance_layer.{{in_proj,out_proj,layers.#.{_IN_OUT}}}",
        "{double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}.lin"),
    "FLUX in diffusers": (
        *_DIFFUSERS_JOINT, "x_embedder", "distilled_guidance_layer.{in_proj,out_proj,layers.#.{linear_1,linear_2}}",
        "transformer_blocks.#.{ff,ff_context}.{linear_in,linear_out}", "single_transformer_blocks.#.attn.to_out",
        "single_transformer_blocks.#.attn.to_qkv_mlp_proj",
        "{double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}.linear",
        "time_guidance_embed.{timestep_embedder,guidance_embedder}.{linear_1,linear_2}"),
    "Stable Diffusion 3": (
        "joint_blocks.#.{context_block,x_block}.{{attn,attn2}.{qkv,proj},mlp.{fc1,fc2},adaLN_modulation.#}",
        "{x_embedder.proj,context_embedder}", "{t_embedder,y_embedder}.mlp.#", _LAST),
    "Stable Diffusion 3 in diffusers": (*_DIFFUSERS_JOINT, "pos_embed.proj"),
    "Qwen-Image": (
        f"transformer_blocks.#.attn.{_JOINT}", f"transformer_blocks.#.{{img_mlp,txt_mlp}}.{_FEED}",
        "transformer_blocks.#.{img_mod,txt_mod}.#", "{img_in,txt_in,proj_out,norm_out.linear}", _DIFFUSERS_TIME),
    "Z-Image": (
        "{layers,noise_refiner,context_refiner}.#.{attention.{qkv,out},feed_forward.{w1,w2,w3},adaLN_modulation.#}",
        "{cap_embedder.#,t_embedder.mlp.#,x_embedder}", _LAST),
    "Z-Image in diffusers": (
        f"{{layers,noise_refiner,context_refiner}}.#.{{attention.{_ATTENTION},feed_forward.{{w1,w2,w3}},"
        f"adaLN_modulation.#}}", "{cap_embedder.#,t_embedder.mlp.#,all_x_embedder.#-#}",
        "all_final_layer.#-#.{linear,adaLN_modulation.#}"),
    "Wan": (
        "blocks.#.{self_attn,cross_attn}.{q,k,v,o}", "blocks.#.cross_attn.{k_img,v_img}", "blocks.#.ffn.#",
        "{text_embedding,time_embedding,time_projection}.#", "{patch_embedding,head.head}", "img_emb.proj.#"),
    "Wan in diffusers": (
        f"blocks.#.{{attn1,attn2}}.{_ATTENTION}", "blocks.#.attn2.{add_k_proj,add_v_proj}", f"blocks.#.ffn.{_FEED}",
        "condition_embedder.{text_embedder,time_embedder}.{linear_1,linear_2}", "condition_embedder.time_proj",
        f"condition_embedder.image_embedder.ff.{_FEED}", "{patch_embedding,proj_out}"),
    "HunyuanVideo": (
        "double_blocks.#.{img_attn_qkv,img_attn_proj,txt_attn_qkv,txt_attn_proj}",
        "double_blocks.#.{img_mlp,txt_mlp}.{fc1,fc2}", "double_blocks.#.{img_mod,txt_mod}.linear", _SINGLES,
        "single_blocks.#.modulation.linear", "{img_in.proj,txt_in.input_embedder,txt_in.t_embedder.mlp.#}",
        "txt_in.c_embedder.{linear_1,linear_2}", "{time_in,guidance_in}.mlp.#", f"vector_in.{_IN_OUT}", _LAST,
        "txt_in.individual_token_refiner.blocks.#.{self_attn_qkv,self_attn_proj,mlp.{fc1,fc2},adaLN_modulation.#}"),
    "HunyuanVideo in diffusers": (
        *_DIFFUSERS_JOINT, "x_embedder.proj", "context_embedder.proj_in", f"context_embedder.{_DIFFUSERS_TIME}",
        f"context_embedder.token_refiner.refiner_blocks.#.{{attn.{_ATTENTION},ff.{_FEED},norm_out.linear}}"),
}
# Networks of which one file may hold layers beside those of a U-Net or transformer, and those that are a U-Net.
TEXT_ENCODERS = frozenset({"CLIP", "T5", "a language model"})
UNETS = frozenset({"Stable Diffusion's U-Net in diffusers", "Stable Diffusion's U-Net"})
# Those whose names are diffusers'; Qwen-Image's own code is diffusers'.
IN_DIFFUSERS = frozenset(name for name in NETWORKS if name.endswith(" in diffusers")) | {"Qwen-Image"}


def expanded(row: str) -> Iterator[str]:
    """Yield the paths of a row without braces: ``a.{b,c}`` is ``a.b`` and ``a.c``."""
    inner = re.search(r"\{[^{}]*\}", row)
    if inner is None:
        yield row
        return
    yield from itertools.chain.from_iterable(
        expanded(row[:inner.start()] + choice + row[inner.end():]) for choice in inner[0][1:-1].split(","))
