"""Where the parameters of our models stand in a Stable Diffusion 1.x folder of diffusers.

A function for each model: from the path of a parameter of ours to the names of its parts there (see loading.Origin).
The order of the blocks differs (ours are counted through, theirs by level), and so do some names; norms have weight and
bias for gamma and beta.
"""

import re

from loading import Origin

RESIDUAL = {"in_layers_norm": "norm1", "in_layers_conv.conv": "conv1", "emb_layers.1": "time_emb_proj",
            "out_layers_norm": "norm2", "out_layers_conv.conv": "conv2", "skip_connection.conv": "conv_shortcut"}
UNET = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0.conv": "conv_in", "out.0": "conv_norm_out", "out.2.conv": "conv_out"}
TEXT = {"attn.attn.in_proj": "self_attn.{}_proj", "attn.attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1",
        "ln_2": "layer_norm2", "c_fc": "mlp.fc1", "c_proj": "mlp.fc2"}
# In each of these, the name before diffusers 0.16 and the one since.
ATTENTION = {"q": ("query", "to_q"), "k": ("key", "to_k"), "v": ("value", "to_v"),
             "proj_out": ("proj_attn", "to_out.0"), "norm": ("group_norm", "group_norm")}
LAST = {"gamma": "weight", "beta": "bias"}


def split(path: str) -> tuple[str, str]:
    """The path of a cell, and its parameter's name there."""
    cell, _, last = path.rpartition(".")
    return cell, LAST.get(last, last)


def unet_origin(path: str, num_res_blocks: int) -> Origin:
    """The place of a parameter of UNetModel.

    Args:
        path: Of the parameter.
        num_res_blocks: Residual blocks of each level on the way down.
    """
    cell, last = split(path)
    return ((f"{UNET.get(cell) or unet_cell(cell, num_res_blocks)}.{last}",),)


def unet_cell(cell: str, num_res_blocks: int) -> str:
    """The path in diffusers of a cell inside the U-Net's blocks."""
    side, rest = cell.split(".", 1)
    if side == "middle_block":
        number, rest = rest.split(".", 1)
        kind = "attentions.0" if number == "1" else f"resnets.{int(number) // 2}"
        return f"mid_block.{kind}.{RESIDUAL.get(rest, rest)}"
    block, number, rest = rest.split(".", 2)
    down = side == "input_blocks"
    level, place = divmod(int(block) - down, num_res_blocks + 1)
    level_name = f"down_blocks.{level}" if down else f"up_blocks.{level}"
    if rest in ("op.conv", "conv.conv"):
        return f"{level_name}.{'downsamplers' if down else 'upsamplers'}.0.conv"
    kind = "resnets" if number == "0" else "attentions"
    return f"{level_name}.{kind}.{place}.{RESIDUAL.get(rest, rest)}"


def text_origin(path: str) -> Origin:
    """The place of a parameter of TextEncoder; query, key and value are one layer of ours and three of theirs."""
    if path == "embedding_table":
        return (("text_model.embeddings.token_embedding.weight",),)
    if path == "positional_embedding":
        return (("text_model.embeddings.position_embedding.weight",),)
    cell, last = split(path)
    if cell == "ln_final":
        return ((f"text_model.final_layer_norm.{last}",),)
    number, rest = cell.removeprefix("transformer_layer.resblocks.").split(".", 1)
    name = f"text_model.encoder.layers.{number}.{TEXT[rest]}.{last}"
    return tuple((name.format(part),) for part in "qkv") if "{}" in name else ((name,),)


def autoencoder_origin(path: str, levels: int) -> Origin:
    """The place of a parameter of AutoencoderKL.

    Args:
        path: Of the parameter.
        levels: Levels of the encoder; the decoder's are counted from the deepest there.
    """
    cell, last = split(path)
    attention = re.fullmatch(r"(\w+)\.mid\.attn_1\.(\w+)", cell)
    if attention:
        return (tuple(f"{attention[1]}.mid_block.attentions.0.{name}.{last}" for name in ATTENTION[attention[2]]),)
    cell = re.sub(r"\.mid\.block_([12])\.", lambda found: f".mid_block.resnets.{int(found[1]) - 1}.", cell)
    cell = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", cell)
    cell = re.sub(r"\.up\.(\d+)\.", lambda found: f".up_blocks.{levels - 1 - int(found[1])}.", cell)
    cell = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", cell).replace("nin_shortcut", "conv_shortcut")
    cell = re.sub(r"\.(down|up)sample\.conv$", r".\1samplers.0.conv", cell).replace("norm_out", "conv_norm_out")
    return ((f"{cell}.{last}",),)
