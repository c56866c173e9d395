"""PEFT and diffusers themselves load what we write, and compute our numbers."""
from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import files
import numpy as np
import pytest
from adapters import MAGNITUDE, A, B, conv, dense, lora, read

from mindpet_lite.formats import diffusers, kohya
from mindpet_lite.formats.files import to_bytes
from mindpet_lite.offline.merge import merge as merge_files

MISSING = [name for name in ("torch", "peft", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.interop, pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'mindpet_lite[interop]'")]

LLAMA = ["lora_plain", "lora_all_linear", "lora_all_linear_exclude", "lora_rank_alpha_pattern", "lora_regex",
         "lora_layers_to_transform", "lora_init_gaussian", "lora_rslora", "lora_dora", "lora_embedding",
         "lora_embedding_dora", "lora_lora_bias", "lora_bias_all", "lora_bias_lora_only", "lora_modules_to_save",
         "lora_trainable_token_indices", "lora_init_orthogonal", "lora_init_pissa", "lora_init_olora"]
# Made-up adapters of the U-Net: ranks that differ, and alphas. (diffusers 0.42 takes one alpha for all attention layers
# of a kohya file.)
MIXED = {"diffusers": {"alphas": (1.5, 2, 3, 0.7)}, "diffusers_rslora": {"alphas": (1.5, 2), "use_rslora": True},
         "diffusers_dora": {"alphas": (1.5, 2), "use_dora": True}, "kohya": {"alphas": (3,)},
         "kohya_rslora": {"alphas": (3,), "ranks": (4,), "use_rslora": True},
         "kohya_rslora_6": {"alphas": (3,), "ranks": (6,), "use_rslora": True}}


def mixed(base, alphas, ranks=(2, 3, 4), **settings):
    """Return an adapter of every third layer: dense, 1x1 and 3x3 convolutions."""
    layers = {}
    for number, (name, weight) in enumerate(base.items()):
        if name.endswith(".weight") and weight.ndim > 1 and number % 3 == 0:
            kind, size = (dense, {}) if weight.ndim == 2 else (conv, {"kernel": weight.shape[2]})
            layers[name.removesuffix(".weight")] = kind(
                ranks[number % len(ranks)], alphas[number % len(alphas)], (weight.shape[1], weight.shape[0]),
                seed=number, **size, **settings)
            if settings.get("use_dora"):
                magnitude = layers[name.removesuffix(".weight")].tensors[MAGNITUDE]
                magnitude += np.linalg.norm(weight.reshape(len(weight), -1), axis=1).reshape(magnitude.shape)
    return lora(layers)


def text_encoder():
    """Return an adapter of a CLIP text encoder, beside one layer of the U-Net."""
    layers = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": dense(4, 5, (32, 32))}
    for number in range(2):
        for name, sizes in (("self_attn.q_proj", (32, 32)), ("self_attn.out_proj", (32, 32)), ("mlp.fc1", (32, 64))):
            layers[f"text_encoder.text_model.encoder.layers.{number}.{name}"] = dense(2, 5, sizes, seed=len(layers))
    return lora(layers)


def merge(base, state):
    """Return the weights with the adapter in them, computed in float64: W + s B A, in DoRA's form where it is DoRA."""
    weights = dict(base)
    for path, layer in state.layers.items():
        own, weight = layer.settings, base[f"{path}.weight"].astype(np.float64)
        scale = own["lora_alpha"] / (math.sqrt(own["lora_rank"]) if own.get("use_rslora") else own["lora_rank"])
        a, b = (layer.tensors[name].astype(np.float64) for name in (A, B))
        value = weight + scale * (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(weight.shape)
        if MAGNITUDE in layer.tensors:
            rows = value.reshape(len(value), -1)
            rows *= (layer.tensors[MAGNITUDE].reshape(-1) / np.linalg.norm(rows, axis=1))[:, None]
        weights[f"{path}.weight"] = value.astype(np.float32)
    return weights


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Return the outputs of all jobs by name; one process, because PyTorch takes long to load."""
    shared = Path(__file__).parents[2] / "shared" / "fixtures" / "peft"
    if not shared.is_dir():
        pytest.skip(f"the shared fixtures are not at {shared}")
    folder = tmp_path_factory.mktemp("interop")
    unet, llama = shared / "unet_tiny", shared / "llama_tiny"
    base, _ = read(unet / "base" / "diffusion_pytorch_model.safetensors")
    jobs = []

    def job(name, kind, base_folder, data, adapter=""):
        jobs.append({"name": name, "kind": kind, "base": str(base_folder), "data": str(data), "adapter": str(adapter)})

    def write(name, codec, state):
        (folder / name).mkdir()
        (folder / name / "adapter.safetensors").write_bytes(to_bytes(*codec.encode(state)))
        job(name, "diffusers", unet / "base", unet / "io.npz", folder / name / "adapter.safetensors")

    state = files.load(unet / "peft")
    for name, codec in (("unet_diffusers", diffusers), ("unet_kohya", kohya)):
        write(name, codec, state)
    files.save(state, folder / "unet_peft")
    job("unet_peft", "peft", unet / "base", unet / "io.npz", folder / "unet_peft")
    for name in LLAMA:
        files.save(files.load(llama / name), folder / name)
        job(name, "peft", llama / "base", llama / name / "io.npz", folder / name)
    for name, settings in MIXED.items():
        state = mixed(base, **settings)
        write(name, diffusers if name.startswith("diffusers") else kohya, state)
        shutil.copytree(unet / "base", folder / f"{name}_merged")
        (folder / f"{name}_merged" / "diffusion_pytorch_model.safetensors").write_bytes(to_bytes(merge(base, state)))
        job(f"{name}_merged", "plain", folder / f"{name}_merged", unet / "io.npz")
    state = text_encoder()
    np.savez(folder / "text.npz", **{
        path.removeprefix("text_encoder."): (2.5 * layer.tensors[B] @ layer.tensors[A]).astype(np.float32)
        for path, layer in state.layers.items() if path.startswith("text_encoder.")})
    job("text_merged", "text", "", folder / "text.npz")
    for name, codec in (("text_diffusers", diffusers), ("text_kohya", kohya)):
        (folder / name).mkdir()
        (folder / name / "adapter.safetensors").write_bytes(to_bytes(*codec.encode(state)))
        job(name, "text", unet / "base", "", folder / name / "adapter.safetensors")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = subprocess.run([sys.executable, Path(__file__).with_name("torch_side.py"), folder / "jobs.json",
                             folder / "out.npz"], capture_output=True, text=True, cwd=folder, timeout=600)
    assert result.returncode == 0, result.stderr
    return shared, dict(np.load(folder / "out.npz"))


def assert_close(found, wanted):
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["unet_diffusers", "unet_kohya", "unet_peft"])
def test_the_unets_adapter_in_each_format(outputs, name):
    shared, found = outputs
    assert_close(found[name], np.load(shared / "unet_tiny" / "io.npz")["output_lora"])


@pytest.mark.parametrize("name", ["text_diffusers", "text_kohya"])
def test_a_text_encoder_beside_the_unet(outputs, name):
    _, found = outputs
    assert_close(found[name], found["text_merged"])


@pytest.mark.parametrize("name", LLAMA)
def test_peft_reads_ours(outputs, name):
    shared, found = outputs
    assert_close(found[name], np.load(shared / "llama_tiny" / name / "io.npz")["output.logits"])


@pytest.mark.parametrize("name", MIXED)
def test_every_kind_of_layer_with_a_rank_and_an_alpha_of_its_own(outputs, name):
    _, found = outputs
    assert_close(found[name], found[f"{name}_merged"])


GROWN = {
    "Llama": ("LlamaForCausalLM", {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
                                   "num_attention_heads": 2, "num_key_value_heads": 1}, "q_proj"),
    "GPTNeoX": ("GPTNeoXForCausalLM", {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
                                       "num_attention_heads": 2}, "query_key_value"),
    "GPT2": ("GPT2LMHeadModel", {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}, "c_attn"),
    "T5": ("T5ForConditionalGeneration", {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}, "q"),
    "Bert": ("BertForMaskedLM", {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
                                 "num_attention_heads": 2}, "query"),
    "Mamba": ("MambaForCausalLM", {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}, "in_proj"),
    "Whisper": ("WhisperForConditionalGeneration", {
        "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_target_positions": 8,
        "max_source_positions": 8, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 3}, "q_proj")}


@pytest.mark.parametrize("model", GROWN)
def test_grown_vocabularies_of_transformers_merge_as_peft_merges(model):
    import peft as peft_library
    import torch
    import transformers
    kind, sizes, target = GROWN[model]
    torch.manual_seed(0)
    net = getattr(transformers, kind)(getattr(transformers, f"{model}Config")(vocab_size=20, **sizes))
    net.resize_token_embeddings(24)
    net.save_pretrained("base")
    tuned = peft_library.get_peft_model(net, peft_library.LoraConfig(r=2, lora_alpha=4, target_modules=[target]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / 3)
    tuned.save_pretrained("adapter", save_embedding_layers=True)
    merge_files(Path("base"), Path("adapter"), Path("out"), quiet=True)
    wanted = tuned.merge_and_unload().state_dict()
    found = getattr(transformers, kind).from_pretrained("out").state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6), name
