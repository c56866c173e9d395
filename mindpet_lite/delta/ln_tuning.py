"""Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning.

Zhao et al., 2023, https://arxiv.org/abs/2312.11420.

    y = (x - E[x]) / sqrt(Var[x] + eps) · γ + β                                        (section 3: only γ and β train)

or whatever else the norm computes, such as x / RMS(x) · γ. Nothing is added to the net: its norms train, all else is
frozen. In a net with another adapter they become a part of that adapter, as PEFT's `modules_to_save` has it.
"""
from __future__ import annotations

import dataclasses
from typing import ClassVar

from mindspore import Parameter, mint, nn

from mindpet_lite.delta.base import Delta, type_refusal
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.selection import Selection
from mindpet_lite.formats.peft_method import PeftMethod
from mindpet_lite.names.parameter_names import pytorch_name

# Those of MindSpore whose γ may have several axes.
_OF_MANY_AXES = (nn.LayerNorm, mint.nn.LayerNorm)


class TrainedNorm(Selection):
    """The scale and the shift of a norm, which LN tuning trains."""

    method: ClassVar[str] = "ln_tuning"

    @classmethod
    def chosen(cls, cell: nn.Cell) -> dict[str, Parameter]:
        """Return the norm's Parameters as PyTorch calls them: `weight` (gamma) and, where there is one, `bias` (beta).

        All libraries' files have these names, so that a file fits a norm of any class.
        """
        return {pytorch_name(name): item for name, item in cell.parameters_and_names(expand=False)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LNTuningConfig(DeltaConfig):
    """Settings of LN tuning: those of `DeltaConfig`; without `target_modules` every norm of the net trains.

    A norm is a cell whose own Parameters are a weight (gamma) and, where there is one, a bias (beta) of the same shape:
    nn.LayerNorm, nn.GroupNorm, mint.nn.LayerNorm, an RMSNorm of your own. Without `target_modules` a cell of your own
    counts where its class is called a norm. BatchNorm has statistics besides, for which the adapter has no place: name
    such layers in `modules_to_save`.

    The Parameters are those of the base. So a base checkpoint that is loaded after training overwrites what trained;
    before, it is the start. `set_lora_scale` is refused; `adapters_disabled` gives the base exactly. In a net with
    another adapter the norms belong to that adapter: they are saved, switched off and merged with it.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.LayerNorm((8,)), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LNTuningConfig())
        >>> [item.name for item in net.trainable_params()]
        ['1.gamma', '1.beta']
    """

    pet_type: ClassVar[str] = "ln_tuning"
    all_by_default: ClassVar[bool] = True
    adds_nothing: ClassVar[bool] = True
    peft: ClassVar[PeftMethod] = PeftMethod("LN_TUNING", {"weight": "ln_tuning_layers.weight",
                                                          "bias": "ln_tuning_layers.bias"})

    @classmethod
    def trained_pattern(cls) -> str:
        """Return the pattern of what norms are usually called."""
        return "*norm*"

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` is no norm to train, or None if it is one."""
        kind = type(cell).__name__
        if isinstance(cell, Delta):
            return f"a {kind} is adapted already; LN tuning trains norms that are plain."
        own = dict(cell.parameters_and_names(expand=False))
        parts = TrainedNorm.chosen(cell)
        if set(parts) not in ({"weight"}, {"weight", "bias"}):
            return (f"{kind} is no norm that can be tuned alone: expected a weight (gamma) and at most a bias (beta), "
                    f"but its Parameters are {', '.join(own) or 'none'}. Name it in modules_to_save to train it whole.")
        shapes = {tuple(item.shape) for item in parts.values()}
        if len(shapes) > 1 or not isinstance(cell, _OF_MANY_AXES) and parts["weight"].size != max(
                parts["weight"].shape, default=1):
            return (f"{kind} is no norm: expected a number for each channel, but its Parameters have the shapes "
                    f"{', '.join(str(tuple(item.shape)) for item in own.values())}. Name it in modules_to_save to "
                    f"train it whole.")
        if getattr(cell, "affine", True) is False:
            return f"the {kind} was made with affine=False, so that its weight and bias are constants."
        return next(filter(None, (type_refusal(item, "LN tuning") for item in own.values())), None)

    @classmethod
    def is_meant(cls, cell: nn.Cell) -> bool:
        """Tell whether `cell` is a norm by its class."""
        return cls.refusal(cell) is None and any("norm" in kind.__name__.lower() for kind in type(cell).__mro__)

    def adapt(self, cell: nn.Cell) -> TrainedNorm:
        """Return the view of the norm's Parameters."""
        return TrainedNorm(cell)
