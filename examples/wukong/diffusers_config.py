"""The configs of a Stable Diffusion 1.x folder of diffusers as those of our models; what these cannot be is refused."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from base import BaseError

# What each config may say; what it leaves out is the same. Keys of sizes are read below.
UNET = {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": None,
        "addition_embed_type_num_heads": 64, "addition_time_embed_dim": None, "attention_type": "default",
        "center_input_sample": False, "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3,
        "conv_out_kernel": 3, "cross_attention_norm": None, "downsample_padding": 1, "dropout": 0,
        "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True,
        "freq_shift": 0, "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "num_attention_heads": None,
        "num_class_embeds": None, "only_cross_attention": False, "projection_class_embeddings_input_dim": None,
        "resnet_out_scale_factor": 1, "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
        "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
        "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
        "upcast_attention": False, "use_linear_projection": False}
VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "latents_mean": None, "latents_std": None,
       "mid_block_add_attention": True, "shift_factor": None, "use_post_quant_conv": True, "use_quant_conv": True}
TEXT = {"hidden_act": "quick_gelu", "model_type": ("clip_text_model", "clip")}
SCHEDULER = {"beta_schedule": "scaled_linear", "prediction_type": ("epsilon", "v_prediction"),
             "rescale_betas_zero_snr": False, "trained_betas": None}
UNET_SIZES = ("in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types",
              "layers_per_block", "attention_head_dim", "cross_attention_dim")
VAE_SIZES = ("in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types",
             "latent_channels", "layers_per_block")
TEXT_SIZES = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
              "num_hidden_layers", "vocab_size")
SCHEDULER_SIZES = ("beta_end", "beta_start", "num_train_timesteps")


def read_configs(folder: Path) -> dict:
    """What config.yaml of a base of our own would say of this one (see base.py), but for the vocabulary.

    Raises:
        BaseError: A config is missing or damaged, or describes what our models cannot be.
    """
    vae, path = read_config(folder / "vae" / "config.json", VAE_SIZES)
    autoencoder = autoencoder_arguments(vae, path)
    unet = unet_arguments(*read_config(folder / "unet" / "config.json", UNET_SIZES))
    text_encoder = text_arguments(*read_config(folder / "text_encoder" / "config.json", TEXT_SIZES))
    schedule = schedule_arguments(*read_config(folder / "scheduler" / "scheduler_config.json", SCHEDULER_SIZES))
    scale_factor = vae.get("scaling_factor", 0.18215)
    if isinstance(scale_factor, bool) or not isinstance(scale_factor, int | float) or not scale_factor > 0:
        raise BaseError(f"{path}: scaling_factor must be a number above 0, got {scale_factor!r}")
    if unet["context_dim"] != text_encoder["width"]:
        raise BaseError(f"{folder}: unet/config.json reads texts of width cross_attention_dim={unet['context_dim']}, "
                        f"but text_encoder/config.json gives hidden_size={text_encoder['width']}")
    if unet["in_channels"] != autoencoder["embed_dim"]:
        raise BaseError(f"{folder}: unet/config.json takes in_channels={unet['in_channels']}, but vae/config.json "
                        f"gives latent_channels={autoencoder['embed_dim']}: only text to image can be tuned here")
    return {"unet": unet, "text_encoder": text_encoder, "autoencoder": autoencoder, "schedule": schedule,
            "scale_factor": float(scale_factor)}


def read_config(path: Path, needed: Iterable[str]) -> tuple[dict[str, Any], Path]:
    """A JSON object, and the path for messages.

    Raises:
        BaseError: The file is missing or no JSON object, or lacks a needed key.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseError(f"no file {path}: a Stable Diffusion 1.x folder has it; copy the whole folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(f"{path} cannot be read as JSON ({error}): copy it again") from None
    if not isinstance(config, dict):
        raise BaseError(f"{path} must hold a JSON object, but holds a {type(config).__name__}")
    missing = [key for key in needed if key not in config]
    if missing:
        raise BaseError(f"{path} lacks {', '.join(missing)}: the sizes of the model cannot be known")
    return config, path


def check(config: dict, path: Path, only: dict[str, Any]) -> None:
    """Refuses values other than the ones our models have.

    Raises:
        BaseError: It names the first such key.
    """
    for key, expected in only.items():
        values = expected if isinstance(expected, tuple) else (expected,)
        if key in config and config[key] not in values:
            raise BaseError(f"{path}: {key} must be {json.dumps(values[0])}, got {json.dumps(config[key])}: only the "
                            "architecture of Stable Diffusion 1.x can be loaded")


def whole(config: dict, path: Path, *keys: str) -> None:
    """Refuses sizes that are not whole numbers above 0, such as lists with a number for each level."""
    for key in keys:
        if type(config[key]) is not int or config[key] < 1:
            raise BaseError(f"{path}: {key} must be one whole number above 0, got {json.dumps(config[key])}")


def widths(config: dict, path: Path, groups: int) -> list[int]:
    """The widths of the levels as multiples of the first.

    Raises:
        BaseError: They are no such multiples, or no multiples of the groups of the norms.
    """
    found = config["block_out_channels"]
    good = isinstance(found, list) and found and all(type(width) is int and width > 0 for width in found)
    if not good or any(width % found[0] or width % groups for width in found):
        raise BaseError(f"{path}: block_out_channels must be multiples of the first and of norm_num_groups={groups}, "
                        f"got {json.dumps(found)}")
    return [width // found[0] for width in found]


def kinds(config: dict, path: Path, key: str, expected: list[str]) -> None:
    """Refuses blocks other than these.

    Raises:
        BaseError: It names both.
    """
    if config[key] != expected:
        raise BaseError(f"{path}: {key} must be {json.dumps(expected)}, got {json.dumps(config[key])}")


def unet_arguments(config: dict, path: Path) -> dict:
    """The arguments of UNetModel."""
    config = {"transformer_layers_per_block": 1, "norm_num_groups": 32, "sample_size": 64, **config}
    heads = config["attention_head_dim"]
    if isinstance(heads, list) and len(set(heads)) == 1:
        config["attention_head_dim"] = heads[0]
    check(config, path, UNET)
    known = {*UNET, *UNET_SIZES, "transformer_layers_per_block", "norm_num_groups", "sample_size"}
    strange = [key for key in config if key not in known and key[0] != "_" and config[key] not in (None, False)]
    if strange:
        raise BaseError(f"{path}: {strange[0]}={json.dumps(config[strange[0]])} is not known here: only the "
                        "architecture of Stable Diffusion 1.x can be loaded")
    whole(config, path, "in_channels", "out_channels", "layers_per_block", "attention_head_dim", "cross_attention_dim",
          "transformer_layers_per_block", "norm_num_groups", "sample_size")
    mult = widths(config, path, config["norm_num_groups"])
    down = config["down_block_types"]
    attention = [isinstance(down, list) and level < len(down) and down[level] == "CrossAttnDownBlock2D"
                 for level in range(len(mult))]
    kinds(config, path, "down_block_types", ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attention])
    kinds(config, path, "up_block_types", ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in attention[::-1]])
    # In these configs attention_head_dim is the number of heads, an old mistake that diffusers keeps.
    return {"image_size": config["sample_size"], "in_channels": config["in_channels"],
            "out_channels": config["out_channels"], "model_channels": config["block_out_channels"][0],
            "attention_resolutions": [2 ** level for level, one in enumerate(attention) if one],
            "num_res_blocks": config["layers_per_block"], "channel_mult": mult,
            "num_heads": config["attention_head_dim"], "context_dim": config["cross_attention_dim"],
            "transformer_depth": config["transformer_layers_per_block"], "groups": config["norm_num_groups"],
            "exact_gelu": True}


def autoencoder_arguments(config: dict, path: Path) -> dict:
    """The arguments of AutoencoderKL."""
    config = {"norm_num_groups": 32, "sample_size": 512, **config}
    check(config, path, VAE)
    whole(config, path, "in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups",
          "sample_size")
    mult = widths(config, path, config["norm_num_groups"])
    kinds(config, path, "down_block_types", ["DownEncoderBlock2D"] * len(mult))
    kinds(config, path, "up_block_types", ["UpDecoderBlock2D"] * len(mult))
    return {"embed_dim": config["latent_channels"], "ddconfig": {
        "z_channels": config["latent_channels"], "resolution": config["sample_size"],
        "in_channels": config["in_channels"], "out_ch": config["out_channels"], "ch": config["block_out_channels"][0],
        "ch_mult": mult, "num_res_blocks": config["layers_per_block"], "attn_resolutions": [],
        "groups": config["norm_num_groups"], "spare_resampling": False}}


def text_arguments(config: dict, path: Path) -> dict:
    """The arguments of TextEncoder."""
    check(config, path, TEXT)
    whole(config, path, *TEXT_SIZES)
    width = config["hidden_size"]
    if config["intermediate_size"] != 4 * width:
        raise BaseError(f"{path}: intermediate_size must be four times hidden_size={width}, got "
                        f"{config['intermediate_size']}")
    return {"context_length": config["max_position_embeddings"], "vocab_size": config["vocab_size"],
            "output_dim": width, "width": width, "layers": config["num_hidden_layers"],
            "heads": config["num_attention_heads"], "epsilon": config.get("layer_norm_eps", 1e-5)}


def schedule_arguments(config: dict, path: Path) -> dict:
    """The arguments of Schedule."""
    config = {"beta_schedule": "linear", "prediction_type": "epsilon", **config}
    check(config, path, SCHEDULER)
    return {"timesteps": config["num_train_timesteps"], "linear_start": config["beta_start"],
            "linear_end": config["beta_end"], "prediction": config["prediction_type"].removesuffix("_prediction")}
