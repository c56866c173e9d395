"""A decoder of the Llama kind in float64 numpy, written from the papers: nothing is fused, shared or cached.

RMSNorm: arXiv 1910.07467, eq. 4. Rotary positions: arXiv 2104.09864, eq. 34, pairs (i, i + d / 2). Grouped queries:
arXiv 2305.13245. SwiGLU: arXiv 2002.05202, eq. 6.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * weight


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def turned(x: np.ndarray, theta: float) -> np.ndarray:
    """One head's vectors (length, d), each pair turned by position * theta^(-2i / d)."""
    length, d = x.shape
    y = np.empty_like(x)
    for place in range(length):
        for i in range(d // 2):
            angle = place * theta ** (-2 * i / d)
            a, b = x[place, i], x[place, i + d // 2]
            y[place, i] = a * np.cos(angle) - b * np.sin(angle)
            y[place, i + d // 2] = b * np.cos(angle) + a * np.sin(angle)
    return y


def attention(x: np.ndarray, weights: Weights, name: str, sizes) -> np.ndarray:
    length, d = len(x), sizes.head_dim
    query, key, value = (linear(x, weights, f"{name}.{part}_proj").reshape(length, -1, d) for part in "qkv")
    out = np.empty_like(query)
    for head in range(sizes.num_attention_heads):
        group = head * sizes.num_key_value_heads // sizes.num_attention_heads
        scores = turned(query[:, head], sizes.rope_theta) @ turned(key[:, group], sizes.rope_theta).T / np.sqrt(d)
        scores[np.triu_indices(length, 1)] = -np.inf
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = chances / chances.sum(-1, keepdims=True) @ value[:, group]
    return linear(out.reshape(length, -1), weights, f"{name}.o_proj")


def logits(ids: np.ndarray, weights: Weights, sizes) -> np.ndarray:
    """Logits (length, vocabulary) of one text."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    table = weights["model.embed_tokens.weight"]
    x = table[ids]
    for i in range(sizes.num_hidden_layers):
        layer = f"model.layers.{i}"
        x = x + attention(norm(x, weights[f"{layer}.input_layernorm.weight"], sizes.rms_norm_eps), weights,
                          f"{layer}.self_attn", sizes)
        h = norm(x, weights[f"{layer}.post_attention_layernorm.weight"], sizes.rms_norm_eps)
        gate = linear(h, weights, f"{layer}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, weights, f"{layer}.mlp.up_proj"), weights,
                       f"{layer}.mlp.down_proj")
    x = norm(x, weights["model.norm.weight"], sizes.rms_norm_eps)
    return x @ (table if sizes.tie_word_embeddings else weights["lm_head.weight"]).T


def answer_loss(ids: np.ndarray, labels: np.ndarray, weights: Weights, sizes) -> float:
    """Mean cross entropy of the next token over the places whose label is not -100; ids, labels (batch, length)."""
    losses = []
    for row, wanted in zip(ids, labels):
        found = logits(row, weights, sizes)[:-1]
        found = found - found.max(-1, keepdims=True)
        chances = found - np.log(np.exp(found).sum(-1, keepdims=True))
        losses += [-chances[i, label] for i, label in enumerate(wanted[1:]) if label != -100]
    return float(np.mean(losses))
