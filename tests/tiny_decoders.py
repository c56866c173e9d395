"""Small random models in folders as Hugging Face's, a tokenizer of bytes, and data: what test_causal_lm*.py share."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CAUSAL_LM = Path(__file__).resolve().parent.parent / "examples" / "causal_lm"
# At the end: no module there has the name of another example's, but for the scripts.
sys.path.append(str(CAUSAL_LM))

import gguf  # noqa: E402
from decoder import Decoder, Sizes  # noqa: E402
from gguf_file import ENDS, PARTS  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CONFIG = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259, "max_position_embeddings": 256,
          "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "tie_word_embeddings": True}


def random_weights(net: Decoder, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, parameter in net.parameters_and_names():
        value = rng.standard_normal(parameter.shape).astype(np.float32)
        found[name.replace("embedding_table", "weight")] = \
            1 + 0.2 * value if "norm" in name else 0.2 * value if name.endswith("bias") else 0.4 * value
    return found


def write_model(folder: Path, sizes: Sizes, config: dict, shards: int = 1) -> dict[str, np.ndarray]:
    """Writes a folder as Hugging Face's; returns its weights."""
    folder.mkdir(parents=True)
    weights = random_weights(Decoder(sizes))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
    else:
        files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(weights)}
        for file in set(files.values()):
            save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    return weights


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, two special ones, and one for two spaces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate([*SPECIAL, *alphabet, "ĠĠ"])}, [("Ġ", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def write_gguf(path: Path, weights: dict[str, np.ndarray], architecture: str = "llama", **values) -> None:
    """Writes weights as llama.cpp's converter does: its names, and queries and keys in its order of rows."""
    writer = gguf.GGUFWriter(path, architecture)
    fields = {"block_count": 2, "embedding_length": 16, "feed_forward_length": 24, "attention.head_count": 4,
              "attention.head_count_kv": 2, "context_length": 256} | values
    for key, value in fields.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 1000.0)
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if token in SPECIAL else 1 for token, _ in tokens])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    theirs = {name: f"blk.{{}}.{part}" for part, name in PARTS.items()} | {name: part for part, name in ENDS.items()}
    for name, value in weights.items():
        layer, _, last = name.rpartition(".")
        head, number, part = layer.split(".", 3)[1:] if layer.startswith("model.layers.") else ("", "", layer)
        if part.endswith(("q_proj", "k_proj")):
            heads = 4 if part.endswith("q_proj") else 2
            value = value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{theirs[part].format(number)}.{last}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_lines(path: Path, rows: list) -> Path:
    """Writes JSONL; a text stands as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
