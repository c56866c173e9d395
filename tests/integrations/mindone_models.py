"""Models of mindone 0.5 in small, how each is called, and what of it is adapted."""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor
from whole import pictures, tokens

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "attn_implementation": "eager"}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False}


def transformer(kind, config, **settings):
    def make():
        import mindone.transformers
        import transformers
        return getattr(mindone.transformers, kind)(getattr(transformers, config)(**settings))
    return make


def diffuser(kind, **settings):
    def make():
        import mindone.diffusers
        return getattr(mindone.diffusers, kind)(**settings)
    return make


def decoded(net, ids):
    return net(input_ids=ids, use_cache=False)[0]


def encoded(net, ids):
    return net(input_ids=ids)[0]


def seen(net, pixels):
    return net(pixel_values=pixels)[0]


def denoised(net, x, step, text):
    return net(x, step, text, return_dict=False)[0]


def decoded_from(net, ids, so_far):
    return net(input_ids=ids, decoder_input_ids=so_far, use_cache=False)[0]


def denoised_in_sd3(net, x, step, text, pooled):
    return net(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=step,
               return_dict=False)[0]


def denoised_in_flux(net, x, step, text, pooled, text_places, places):
    return net(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=step,
               txt_ids=text_places, img_ids=places, return_dict=False)[0]


def coded(net, x):
    return net(x, return_dict=False)[0]


LLAMA = transformer("LlamaForCausalLM", "LlamaConfig", **DECODER)
QWEN2 = transformer("Qwen2ForCausalLM", "Qwen2Config", **DECODER, tie_word_embeddings=True)
BERT = transformer("BertModel", "BertConfig", **SIZES, max_position_embeddings=64)
GPT2 = transformer("GPT2LMHeadModel", "GPT2Config", vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64,
                   attn_implementation="eager", use_cache=False)
T5_SIZES = {"vocab_size": 96, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16}
T5 = transformer("T5EncoderModel", "T5Config", **T5_SIZES)
T5_WHOLE = transformer("T5ForConditionalGeneration", "T5Config", **T5_SIZES, use_cache=False)
CLIP = transformer("CLIPTextModel", "CLIPTextConfig", **SIZES, max_position_embeddings=64)
VIT = transformer("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8,
                  **{key: value for key, value in SIZES.items() if key != "vocab_size"})
UNET = diffuser("UNet2DConditionModel", sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
                block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=8, cross_attention_dim=32,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
JOINT = {"in_channels": 4, "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32,
         "pooled_projection_dim": 32}
SD3 = diffuser("SD3Transformer2DModel", **JOINT, sample_size=8, patch_size=2, num_layers=2, out_channels=4,
               caption_projection_dim=64, pos_embed_max_size=8)
FLUX = diffuser("FluxTransformer2DModel", **JOINT, patch_size=1, num_layers=1, num_single_layers=1,
                axes_dims_rope=(4, 4, 8))
VAE = diffuser("AutoencoderKL", block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
               up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8)

IDS, PIXELS = (tokens(2, 8),), (pictures(2, 3, 32, 32),)
NOISE = (pictures(2, 4, 8, 8), Tensor([3, 5], ms.int32), pictures(2, 5, 32))
SD3_NOISE = (*NOISE, pictures(2, 32))
# Flux has its pictures as rows, and the place of each: 4 x 4 here.
FLUX_NOISE = (pictures(1, 16, 4), Tensor([0.004], ms.float32), pictures(1, 5, 32), pictures(1, 32),
              Tensor(np.zeros((5, 3)), ms.float32),
              Tensor([[0, place // 4, place % 4] for place in range(16)], ms.float32))
JOINT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
# Model, call, inputs, targets, and how many layers they are.
CASES = {
    "llama": (LLAMA, decoded, IDS, ["q_proj", "v_proj"], 4),
    "llama-linear": (LLAMA, decoded, IDS, "all-linear", 14),
    "qwen2": (QWEN2, decoded, IDS, ["q_proj", "v_proj"], 4),
    "qwen2-linear": (QWEN2, decoded, IDS, "all-linear", 14),
    "bert": (BERT, encoded, IDS, ["query", "value"], 4),
    "gpt2": (GPT2, decoded, IDS, ["c_attn"], 2),
    "gpt2-linear": (GPT2, decoded, IDS, "all-linear", 8),
    "t5": (T5, encoded, IDS, ["q", "v"], 4),
    "t5-whole": (T5_WHOLE, decoded_from, (tokens(2, 8), tokens(2, 6)), ["q", "v"], 12),
    "clip": (CLIP, encoded, IDS, ["q_proj", "k_proj", "v_proj", "out_proj"], 8),
    "vit": (VIT, seen, PIXELS, ["query", "value"], 4),
    "vit-patches": (VIT, seen, PIXELS, ["projection"], 1),
    "unet": (UNET, denoised, NOISE, ["to_q", "to_k", "to_v", "to_out.0"], 32),
    "sd3": (SD3, denoised_in_sd3, SD3_NOISE, JOINT_TARGETS, 15),
    "flux": (FLUX, denoised_in_flux, FLUX_NOISE, JOINT_TARGETS, 11),
    "vae": (VAE, coded, (pictures(1, 3, 16, 16),), ["to_q", "to_v"], 4),
}
