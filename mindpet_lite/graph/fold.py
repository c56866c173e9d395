"""Leave out what only training needs."""
from __future__ import annotations

from mindspore import nn

from mindpet_lite.graph.adapters import deltas
from mindpet_lite.graph.tree import drop_compiled_graphs, refresh_recomputation


def fold_prefixes(net: nn.Cell) -> nn.Cell:
    """Keep only the prefixes of `net` for inference, in place: embeddings and MLPs are evaluated once and dropped.

    The output in evaluation stays the same bit for bit, adapter files get smaller. Prefixes that are folded already,
    or never had an MLP, stay as they are. A file of folded prefixes loads into a net that is folded or still plain.
    Optimizers made before still hold what was dropped: fold after training.

    Args:
        net: a net with layers of Prefix-Tuning or P-Tuning v2.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: the net has no prefix.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> layer = mp.PrefixDense(4, 8, prefix_token_num=3, embed_dim=4, mid_dim=4)
        >>> net = mp.fold_prefixes(nn.SequentialCell(layer))
        >>> [item.name for item in layer.delta_parameters().values()]
        ['0.mindpet_delta_prefixtuning_prefix']
    """
    found = [delta for delta in deltas(net).values() if delta.foldable]
    if not found:
        raise ValueError("The net has no prefix to fold: its adapters are of methods that keep nothing for training "
                         "alone.")
    for delta in found:
        delta.fold()
    refresh_recomputation(net)
    drop_compiled_graphs(net)
    return net
