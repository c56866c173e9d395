"""Take anew what adapters took from a base that was loaded later."""
from __future__ import annotations

from mindspore import nn

from mindpet_lite.graph.adapters import adapters_of, deltas, deltas_in
from mindpet_lite.graph.strength import adapters_are_disabled
from mindpet_lite.graph.tree import cells_by_path


def refresh_base(net: nn.Cell) -> nn.Cell:
    """Take what the adapters of `net` took from their base from the weights that are in the net now, in place.

    A base may be loaded after its net was adapted. While nothing has trained, that needs no call. Call it where the
    adapter has trained, or was loaded, on other weights, as a warning says. For layers whose weight is another than
    when their delta started:

    - DoRA's magnitude becomes the norm of W + s B A; A and B stay.
    - PiSSA, OLoRA and trainable tokens start again; what they trained is lost.
    - Base Parameters that belong to the adapter (modules_to_save, biases) keep their value, which becomes the base's
      too: the one that they have inside `adapters_disabled`.

    Layers whose weight is the same stay as they are, and so does LoRA, which takes nothing from its base.

    Args:
        net: a net with adapted layers.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: the net has no adapted layer, or its adapters are switched off.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"], use_dora=True))
        >>> _ = net[0].weight.set_data(net[0].weight * 2)         # another base
        >>> net = mp.refresh_base(net)             # DoRA's magnitudes are those of the new weight
    """
    if adapters_are_disabled(net):
        raise ValueError("The adapters are switched off by adapters_disabled(): leave the block before refresh_base().")
    found = deltas_in(cells_by_path(net))
    for delta in found.values():
        if delta.start is not None and delta.start.is_stale():
            delta.start.make_again()
    for record in adapters_of(found.values()):
        if record.base_now() != record.base:
            record.take_base_values()
    deltas(net)
    return net
