"""Bases of transformers and adapters of PEFT, merged file to file: the logits of PEFT, or a refusal."""
from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mindpet_lite.offline.merge import merge

MISSING = [name for name in ("torch", "peft", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.interop, pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'mindpet_lite[interop]'")]

GPT = ({"vocab_size": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "tie_word_embeddings": False})
SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1}
BERT = {**SMALL, "intermediate_size": 16, "num_attention_heads": 2}
MAMBA2 = {**SMALL, "state_size": 4, "num_heads": 4, "head_dim": 4, "n_groups": 1}
XLM = {"vocab_size": 20, "emb_dim": 8, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 16}
XLNET = {"vocab_size": 20, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 16}
# The class, its config, LoRA's settings, and whether the adapter can be merged.
CASES = {
    "GPT-2, a square layer of each kind": ("GPT2LMHeadModel", GPT, {"target_modules": ["c_proj", "lm_head"]}, True),
    "the same with the flag": ("GPT2LMHeadModel", GPT, {
        "target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True}, True),
    "the same with DoRA": ("GPT2LMHeadModel", GPT, {"target_modules": ["c_proj", "lm_head"], "use_dora": True}, True),
    "GPT-2, all": ("GPT2LMHeadModel", GPT, {"target_modules": ["c_attn", "c_proj", "c_fc", "lm_head", "wte"]}, True),
    "GPT-2, PiSSA": ("GPT2LMHeadModel", GPT, {
        "target_modules": ["c_proj", "lm_head"], "init_lora_weights": "pissa"}, True),
    "OpenAI GPT": ("OpenAIGPTLMHeadModel", GPT, {"target_modules": ["c_proj", "c_attn", "lm_head"]}, True),
    "ImageGPT": ("ImageGPTForCausalImageModeling", {**GPT, "vocab_size": 9}, {"target_modules": ["c_proj"]}, True),
    "GPT-BigCode, plain under these names": ("GPTBigCodeForCausalLM", GPT, {"target_modules": ["c_proj"]}, True),
    "Llama, tied": ("LlamaForCausalLM", {**BERT, "tie_word_embeddings": True}, {
        "target_modules": ["q_proj", "embed_tokens"]}, False),
    "Llama, tied, its output layer": ("LlamaForCausalLM", {**BERT, "tie_word_embeddings": True}, {
        "target_modules": ["q_proj", "lm_head"]}, False),
    "Llama, tied, tokens of both": ("LlamaForCausalLM", {**BERT, "tie_word_embeddings": True}, {
        "target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}, True),
    "Llama, untied": ("LlamaForCausalLM", {**BERT, "tie_word_embeddings": False}, {
        "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, True),
    "Mamba": ("MambaForCausalLM", {**SMALL, "state_size": 4}, {"target_modules": ["in_proj", "embeddings"]}, False),
    "Mamba, saved whole": ("MambaForCausalLM", {**SMALL, "state_size": 4}, {
        "target_modules": ["in_proj"], "modules_to_save": ["embeddings"]}, False),
    "Mamba2, tied": ("Mamba2ForCausalLM", {**MAMBA2, "tie_word_embeddings": True}, {
        "target_modules": ["in_proj", "embeddings"]}, False),
    "Mamba2, untied": ("Mamba2ForCausalLM", {**MAMBA2, "tie_word_embeddings": False}, {
        "target_modules": ["in_proj", "embeddings", "lm_head"]}, True),
    "XLNet": ("XLNetLMHeadModel", XLNET, {"target_modules": ["word_embedding"]}, False),
    "XLNet, its output layer": ("XLNetLMHeadModel", XLNET, {"target_modules": ["lm_loss"]}, False),
    "XLM": ("XLMWithLMHeadModel", XLM, {"target_modules": ["embeddings", "q_lin"]}, False),
    "BERT": ("BertForMaskedLM", BERT, {"target_modules": ["query", "word_embeddings"]}, False),
    "BERT, positions": ("BertForMaskedLM", BERT, {"target_modules": ["query", "position_embeddings"]}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_pefts_or_it_is_refused(case):
    import peft
    import torch
    import transformers
    name, settings, lora, is_merged = CASES[case]
    kind = getattr(transformers, name)

    def stir(parameters):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter) / 4)

    torch.manual_seed(0)
    net = kind(kind.config_class(**settings))
    stir(net.parameters())
    net.save_pretrained("base")
    tuned = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=4, **lora))
    stir(parameter for parameter in tuned.parameters() if parameter.requires_grad)
    tuned.save_pretrained("adapter", save_embedding_layers=False)
    if not is_merged:
        with pytest.raises(ValueError, match="one weight for its embedding and its output layer"):
            merge(Path("base"), Path("adapter"), Path("out"), quiet=True)
        return
    merge(Path("base"), Path("adapter"), Path("out"), quiet=True)
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(kind.from_pretrained("base"), "adapter").eval()(ids).logits.numpy()
        found = kind.from_pretrained("out").eval()(ids).logits.numpy()
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
