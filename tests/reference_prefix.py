"""Prefixes in numpy and float64, written from the papers, independent of the package."""
from __future__ import annotations

import numpy as np


def mlp(table, w_in, b_in, w_out, b_out):
    """Return tanh(E W1ᵀ + b1) W2ᵀ + b2."""
    return np.tanh(table @ w_in.T + b_in) @ w_out.T + b_out


def mlp_gradients(table, w_in, b_in, w_out, upstream):
    """Return the gradients of sum(mlp · upstream) by table, w_in, b_in, w_out and b_out."""
    hidden = np.tanh(table @ w_in.T + b_in)
    inner = (upstream @ w_out) * (1 - hidden ** 2)
    return inner @ w_in, inner.T @ table, inner.sum(0), upstream.T @ hidden, upstream.sum(0)


def dense(x, weight, bias, prefix):
    """Return concat([P, x Wᵀ + b]) along the axis of the sequence."""
    y = np.einsum("...i,oi->...o", x, weight) + bias
    return np.concatenate([np.broadcast_to(prefix, (*y.shape[:-2], *prefix.shape)), y], axis=-2)


def dense_gradients(x, weight, rows, upstream):
    """Return the gradients of sum(dense · upstream) by x, weight, bias and the prefix of so many rows."""
    ours, theirs = upstream[..., :rows, :], upstream[..., rows:, :]
    flat = theirs.reshape(-1, theirs.shape[-1])
    return (theirs @ weight, flat.T @ x.reshape(-1, x.shape[-1]), flat.sum(0),
            ours.reshape(-1, *ours.shape[-2:]).sum(0))


def _heads(rows, heads):
    return rows.reshape(*rows.shape[:-1], heads, -1).swapaxes(-2, -3)


def attention(query, key, value, heads, hidden=None):
    """Return softmax(Q Kᵀ / √d) V over all rows of key and value, for (batch, rows, width); `hidden` masks keys."""
    q, k, v = (_heads(item, heads) for item in (query, key, value))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if hidden is not None:
        scores = np.where(hidden, -np.inf, scores)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    y = scores / scores.sum(-1, keepdims=True) @ v
    return y.swapaxes(-2, -3).reshape(query.shape)


def attention_gradients(query, key, value, heads, upstream):
    """Return the gradients of sum(attention · upstream) by query, key and value."""
    q, k, v, g = (_heads(item, heads) for item in (query, key, value, upstream))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    share = scores / scores.sum(-1, keepdims=True)
    by_share = g @ v.swapaxes(-1, -2)
    by_scores = share * (by_share - (by_share * share).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    found = by_scores @ k, by_scores.swapaxes(-1, -2) @ q, share.swapaxes(-1, -2) @ g
    return tuple(item.swapaxes(-2, -3).reshape(whole.shape) for item, whole in zip(found, (query, key, value)))
