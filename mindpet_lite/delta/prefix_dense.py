"""What Prefix-Tuning and P-Tuning v2 share: rows put before a sequence, the mask for them, a layer that adds them."""
from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from typing import Any

import mindspore
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.delta.adapted import Adapted
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.parts import as_type
from mindpet_lite.delta.source import names_in, tree_of


def prepend_prefix(prefix: Tensor, rows: Tensor) -> Tensor:
    """Return concat([prefix, rows]) along the axis of the sequence, the same prefix for every sequence of a batch.

    Args:
        prefix: `(n, width)`.
        rows: keys or values `(*, seq, width)`, before they are split into heads.

    Returns:
        Tensor `(*, n + seq, width)` of the type of `rows`.

    Raises:
        ValueError: `rows` has no axis for the sequence.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> mp.prepend_prefix(Tensor(np.zeros((3, 8), np.float32)), Tensor(np.ones((2, 5, 8), np.float32))).shape
        (2, 8, 8)
    """
    if len(rows.shape) < 2:
        raise ValueError(f"Prefix rows stand before the rows of a sequence: the input must have the axes "
                         f"(*, sequence, width), but its shape is {rows.shape}.")
    prefix = ops.broadcast_to(as_type(prefix, rows.dtype), rows.shape[:-2] + prefix.shape)
    return ops.concat((prefix, rows), -2)


def prefix_mask(attention_mask: Tensor, prefix_token_num: int, visible: float) -> Tensor:
    """Return an attention mask with columns for the prefix on the left of its key axis; every query sees them.

    Args:
        attention_mask: `(batch, key)`, `(batch, query, key)` or `(batch, 1 or heads, query, key)`; any type.
        prefix_token_num: how many rows stand before each sequence; positive.
        visible: what the mask holds where a query sees a key: 1 (or True) in masks that multiply or select, as
            MindPet's documentation uses them; 0 (or False) in masks that are added to the scores, or that mark
            what is hidden.

    Returns:
        Tensor `(..., prefix_token_num + key)` of the type of `attention_mask`.

    Raises:
        ValueError: `attention_mask` has another number of axes, or `prefix_token_num` is not positive.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> mask = Tensor(np.tril(np.ones((1, 2, 2), np.float32)))
        >>> mp.prefix_mask(mask, 3, visible=1).asnumpy().tolist()
        [[[1.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]]]
    """
    if len(attention_mask.shape) < 2 or len(attention_mask.shape) > 4:
        raise ValueError(f"attention_mask must have the axes (batch, key), (batch, query, key) or (batch, heads, "
                         f"query, key), but its shape is {attention_mask.shape}.")
    if prefix_token_num < 1:
        raise ValueError(f"prefix_token_num must be a positive int, but got {prefix_token_num}.")
    columns = ops.full(attention_mask.shape[:-1] + (prefix_token_num,), visible, dtype=attention_mask.dtype)
    return ops.concat((columns, attention_mask), -1)


class PrefixDelta(Delta):
    """What holds of every prefix: it cannot be scaled or merged, but folded."""

    fixed = "a prefix has no strength: rows scaled to zero would still take their share of the attention."
    unmergeable = ("its rows stand beside the layer's output, which no weight of a plain layer can hold; "
                   "fold_prefixes(net) keeps the rows alone for inference.")
    foldable = True

    # An MLP gives the rows; False once folded.
    prefix_projection: bool

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Say where only one of the two has an MLP: sizes show in the shapes, and dropout may differ."""
        if settings.get("prefix_projection", self.prefix_projection) == self.prefix_projection:
            return []
        return ["the prefixes in the file have no MLP, those of the net do: call fold_prefixes(net) first."
                if self.prefix_projection else
                "the prefixes in the file come from an MLP, those of the net have none: load the file into a net that "
                "is not folded."]

    def fold(self) -> None:
        """Keep only the prefixes, for inference: evaluate the MLP once, without dropout, and drop it.

        The output in evaluation stays the same bit for bit; the file gets smaller. A layer that is folded already
        stays as it is. Optimizers made before still hold what was dropped: fold after training.
        """
        if self.prefix_projection:
            self._drop_projection()
            self.prefix_projection = False
            # A compiled graph would run the MLP on.
            mindspore.ms_memory_recycle()

    def _drop_projection(self) -> None:
        raise NotImplementedError


class Prefixed(PrefixDelta, Adapted):
    """A linear layer whose output has prefix rows before the rows of the sequence: base of both methods on a host.

    $$
    y = concat([P, act(x W^T + b)])
    $$
    """

    def prefix_rows(self) -> Tensor:
        """Return P (n, outputs), with dropout in training."""
        raise NotImplementedError

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (*, seq, inputs); return (*, n + seq, outputs)."""
        return prepend_prefix(self.prefix_rows(), self.plain(x))


# What tells such an attention: names of its class and its parts, and names in the code of its `construct`.
_POSITIONS = re.compile(r"rota[tr]|(^|_)rope(_|$)|RoPE|freqs?_cis|inv_freq|cos and sin|input position"
                        r"|alibi|relative_(attention|position)|position_bias|(^|_)rel_pos", re.IGNORECASE)
_FUSED = re.compile(r"flash|scaled_dot_product|fused_attention|is_causal", re.IGNORECASE)
_MASKS = re.compile(r"(^|_)(tril|triu)(_|$)|stored mask", re.IGNORECASE)
# What an attention computes, or what does it.
_ATTENTION = re.compile(r"softmax|attend|attention|attn", re.IGNORECASE)


def attention_refusal(path: str, cells: Mapping[str, nn.Cell]) -> str | None:
    """Return why rows before the keys would be wrong in the attention around a layer, or None if nothing tells so.

    They are right where the attention reads the lengths of queries and keys from the tensors, positions are in its
    input, and its mask has the prefix's columns (`prefix_mask`). Fewer heads of keys than of queries are right
    too: a row is as wide as the layer's output.

    Args:
        path: of the key or value layer.
        cells: of the net, by path.
    """
    around = path.rpartition(".")[0]
    # Projections may stand in a cell of their own, beside or below the one that computes the attention.
    while around and not any(map(_ATTENTION.search, _telling_names(cells[around]))):
        around = around.rpartition(".")[0]
    inside = [cell for place, cell in cells.items()
              if place == around or (f"{place}.".startswith(f"{around}.") if around else "." not in place)]
    names = {name for cell in inside for name in _telling_names(cell)}
    if any(getattr(cell, "position_embedding_type", None) == "absolute" for cell in inside):
        # transformers' BERT, whose code has relative positions too.
        names = {name for name in names if not _POSITIONS.search(name)}
    for pattern, reason in ((_POSITIONS, "takes positions from the place of each key ({}), which a prefix moves"),
                            (_FUSED, "is a fused one ({}), whose mask has no columns for a prefix"),
                            (_MASKS, "makes its mask itself ({}), without columns for a prefix")):
        found = sorted(filter(pattern.search, names))
        if found:
            return (f"the attention at {around or 'the net itself'} {reason.format(', '.join(found[:3]))}. Use LoRA "
                    f"there, or build the attention by hand with prepend_prefix() where the positions are in already.")
    return None


def _telling_names(cell: nn.Cell) -> set[str]:
    """Return the names of a cell's parts and code, and what they tell together."""
    found = names_in(cell) | {f"input {name}" for name in inspect.signature(type(cell).construct).parameters}
    if _cuts_a_stored_mask(cell):
        found.add("a stored mask, cut from its first row and column")
    return found | ({"cos and sin"} if {"cos", "sin"} <= found else set())


def _cuts_a_stored_mask(cell: nn.Cell) -> bool:
    """Tell whether a causal mask made in `__init__` is cut as ``mask[:queries, :keys]``, which a prefix would shift."""
    made = getattr(type(cell).__init__, "__code__", None)
    if made is None or not {"tril", "triu"}.intersection(made.co_names):
        return False
    return any(len(parts) > 1 and all(isinstance(part, ast.Slice) and part.lower is None and part.upper is not None
                                      for part in parts[-2:])
               for node in ast.walk(tree_of(cell)) if isinstance(node, ast.Subscript)
               for parts in [node.slice.elts if isinstance(node.slice, ast.Tuple) else []])


def check_targets(target_modules: str | tuple[str, ...] | None) -> None:
    """Raise ValueError where prefixes would go to layers that are neither keys nor values."""
    if target_modules == "all-linear":
        raise ValueError("target_modules 'all-linear' would lengthen every sequence of the net: prefixes belong to the "
                         "key and value layers of its attentions, so name those, such as ['to_k', 'to_v'].")


def place_names(layer: Delta, prefix: str) -> None:
    """Name the Parameters of a new delta by their path below the layer, after what stands before the layer's own."""
    for name, parameter in layer.delta_parameters().items():
        parameter.name = prefix + name


def folded_parameter(name: str, rows: Tensor, source: Parameter, source_path: str) -> Parameter:
    """Return a Parameter of `rows` that takes the place of `source`: beside it in name, and trained if it was."""
    return Parameter(_settled(rows, source), name=source.name.removesuffix(source_path) + name,
                     requires_grad=source.requires_grad)


def settle_table(table: Parameter, rows: Tensor) -> None:
    """Make `rows` the value of `table`, in memory of its own."""
    table.set_data(_settled(rows, table))


def _settled(rows: Tensor, like: Parameter) -> Tensor:
    return Tensor(rows.astype(mindspore.float32).asnumpy().copy()).astype(like.dtype)
