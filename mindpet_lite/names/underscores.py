"""Paths whose dots became underscores, as kohya's files name layers, and the way back.

``down_blocks_0_attn1_to_q`` may have been ``down_blocks.0.attn1.to_q`` or ``down.blocks.0...``: the file does not say.
With the net's paths the answer is exact. Without them the name is cut into the words of diffusers' U-Net and
transformers, of Stable Diffusion's original U-Net ("SGM": ``input_blocks``...) and of CLIP: at each place the longest
word that lets the rest be cut too. A name with any other word is not guessed at.
"""
from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable

_WORDS = frozenset("""
    down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers motion_modules
    transformer_blocks single_transformer_blocks attn attn1 attn2 attn_temp to_q to_k to_v to_out to_qkv
    add_q_proj add_k_proj add_v_proj to_add_out ff ff_context net proj proj_in proj_out proj_mlp
    norm1 norm2 norm3 norm group_norm conv_norm_out
    conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 linear
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op out time_embed label_emb
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection embeddings
    token_embedding position_embedding layer_norm1 layer_norm2 final_layer_norm
    x_embedder context_embedder time_text_embed timestep_embedder text_embedder guidance_embedder
    double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod qkv lin linear1 linear2 modulation
    img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer
    """.split())
_LONGEST = max(word.count("_") + 1 for word in _WORDS)


class Paths:
    """The way from underscored names to paths, by the net's paths where they are known."""

    def __init__(self, paths: Iterable[str] | None) -> None:
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in dict.fromkeys(paths or ()):
            self._by_name[path.replace(".", "_")].append(path)

    def known(self, *names: str) -> str | None:
        """Return the net's path that has one of `names`, None if it has none.

        Raises:
            ValueError: it has several.
        """
        found = [path for name in names for path in self._by_name.get(name, [])]
        if len(found) > 1:
            raise ValueError(f"{names[0]} may be {' or '.join(found)}: the underscores do not say. Rename the file's "
                             f"keys, or use a format that keeps the dots.")
        return found[0] if found else None

    def near(self, name: str) -> str:
        """Return a hint at the net's closest names, empty if there are none."""
        close = difflib.get_close_matches(name, self._by_name, n=3)
        return f" Close names in the net: {', '.join(self._by_name[item][0] for item in close)}." if close else ""


def cut(name: str) -> str | None:
    """Return the dotted path of `name` by the table of words, None if it holds another word."""
    parts = name.split("_")
    # best[i]: the path of parts[i:], None if they cannot be cut.
    best: list[list[str] | None] = [None] * len(parts) + [[]]
    for start in reversed(range(len(parts))):
        for end in range(min(len(parts), start + _LONGEST), start, -1):
            word, rest = "_".join(parts[start:end]), best[end]
            if rest is not None and (word in _WORDS or (end == start + 1 and word.isdecimal())):
                best[start] = [word, *rest]
                break
    return None if best[0] is None else ".".join(best[0])
