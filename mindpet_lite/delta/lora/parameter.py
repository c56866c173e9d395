"""LoRA on a Parameter of any cell, as PEFT's `target_parameters`: the cell computes with the changed value."""
from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.delta.base import Delta, float64, overflow, type_refusal
from mindpet_lite.delta.lora.settings import LoraSettings, scale_of
from mindpet_lite.delta.lora.starting import HE_UNIFORM
from mindpet_lite.delta.parts import as_type, initial, prefix_of
from mindpet_lite.delta.values import setting_parameter

# The second name of the Parameter: its own one gives the changed value.
_BASE = "mindpet_base"


class LoRAParameter(Delta):
    r"""A user's cell of which one Parameter W has a trainable low-rank update: what all kinds share.

    $$
    W'_e = W_e + \frac{\alpha}{r} B_e A_e
    $$

    `construct` is the cell's own; what it reads as that Parameter is W'. W is a matrix (out, in), or a stack of
    matrices (experts, out, in), or (experts, in, out) where the cell has a true attribute `is_transposed`, or a false
    `transpose_b` as MindFormers' layers have it. As PEFT has
    them, `mindpet_delta_lora_a` is (experts · lora_rank, in), its rows by experts, and `mindpet_delta_lora_b` (out,
    lora_rank · experts), its columns by ranks. `scaling` () holds strength · alpha / r. W' is computed at every use,
    as large as W.

    Made by `mindpet_lite.LoraConfig` with `target_parameters`.

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685; for stacks PEFT.
    """

    method: ClassVar[str] = "lora"
    delta_names = ("mindpet_delta_lora_a", "mindpet_delta_lora_b")
    setting_names = ("scaling",)
    output_names = ("mindpet_delta_lora_b",)

    _plain: tuple[nn.Cell, ...] = ()
    lora_rank: int
    lora_alpha: float
    use_rslora: bool
    target_parameter: str
    mindpet_base: Parameter
    mindpet_delta_lora_a: Parameter
    mindpet_delta_lora_b: Parameter
    scaling: Parameter

    def _of_matrix(self) -> Tensor:
        """Return W' for a matrix."""
        product = ops.matmul(self.mindpet_delta_lora_b, self.mindpet_delta_lora_a) * self.scaling
        return self.mindpet_base + as_type(product, self.mindpet_base.dtype)

    def _of_stack(self) -> Tensor:
        """Return W' for a stack of matrices (out, in)."""
        a = ops.reshape(self.mindpet_delta_lora_a, (self.mindpet_base.shape[0], self.lora_rank, -1))
        b = ops.reshape(self.mindpet_delta_lora_b, (-1, self.lora_rank, self.mindpet_base.shape[0]))
        product = ops.BatchMatMul()(ops.transpose(b, (2, 0, 1)), a) * self.scaling
        return self.mindpet_base + as_type(product, self.mindpet_base.dtype)

    def _of_turned_stack(self) -> Tensor:
        """Return W' for a stack of matrices (in, out)."""
        a = ops.reshape(self.mindpet_delta_lora_a, (self.mindpet_base.shape[0], self.lora_rank, -1))
        b = ops.reshape(self.mindpet_delta_lora_b, (-1, self.lora_rank, self.mindpet_base.shape[0]))
        product = ops.BatchMatMul()(ops.transpose(a, (0, 2, 1)), ops.transpose(b, (2, 1, 0))) * self.scaling
        return self.mindpet_base + as_type(product, self.mindpet_base.dtype)

    @staticmethod
    def refusal(cell: nn.Cell, name: str) -> str | None:
        """Return why the Parameter of this name cannot be adapted in `cell`, or None."""
        own = dict(cell.parameters_and_names(expand=False))
        if name not in own:
            return f"the {type(cell).__name__} holds no Parameter {name!r:.100}."
        if own[name].ndim not in (2, 3):
            return (f"target_parameters adapts matrices and stacks of them, but {name} has the shape "
                    f"{tuple(own[name].shape)}.")
        inner = [item.name for part in cell.cells() for item in part.get_parameters()]
        if inner:
            return (f"cells below it hold Parameters too, such as {inner[0]}: target_parameters adapts a cell that "
                    f"holds its Parameters itself. Put {name} into a cell of its own.")
        return type_refusal(own[name], "LoRA")

    @staticmethod
    def shapes(cell: nn.Cell, config: LoraSettings, name: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        *experts, outputs, inputs = dict(cell.parameters_and_names(expand=False))[name].shape
        if is_turned(cell) and experts:
            outputs, inputs = inputs, outputs
        rows = config.lora_rank * math.prod(experts)
        return {"mindpet_delta_lora_a": (rows, inputs), "mindpet_delta_lora_b": (outputs, rows)}

    @classmethod
    def on(cls, plain: nn.Cell, config: LoraSettings, name: str) -> LoRAParameter:
        """Return the adapted cell on all that `plain` is made of; `plain` stays as it is."""
        parameter = dict(plain.parameters_and_names(expand=False))[name]
        turned = parameter.ndim == 3 and is_turned(plain)
        value = cls._of_turned_stack if turned else cls._of_stack if parameter.ndim == 3 else cls._of_matrix
        owner: Any = type(plain)
        layer: Any = nn.Cell.__new__(_kind(owner, name, value))
        nn.Cell.__init__(layer)
        # Its tables of Parameters and children are its own, so that what is added here is not in `plain`.
        vars(layer).update({key: item.copy() if isinstance(item, (dict, list, set)) else item
                            for key, item in vars(plain).items()})
        layer.insert_param_to_cell(_BASE, parameter)
        layer.target_parameter, layer._plain = name, (plain,)
        layer.lora_rank, layer.lora_alpha = config.lora_rank, config.lora_alpha
        layer.use_rslora = config.use_rslora
        prefix = prefix_of(parameter.name)
        starts = (HE_UNIFORM, "zeros") if config.init_lora_weights else (HE_UNIFORM, HE_UNIFORM)
        for (own, shape), start in zip(cls.shapes(plain, config, name).items(), starts):
            setattr(layer, own, Parameter(initial(own, start, shape, config.param_init_type), name=prefix + own))
        layer.scaling = setting_parameter(layer.factor(), prefix + "scaling")
        found: LoRAParameter = layer
        return found

    def factor(self) -> float:
        """Return s."""
        return scale_of(self.lora_alpha, self.lora_rank, self.use_rslora)

    def setting_values(self) -> dict[str, Any]:
        """Return ``strength · s``, or 0 where switched off."""
        return {"scaling": self.strength * self.factor() if self.enabled else 0.0}

    def overflows(self, strength: float) -> str:
        """Return why the scaling cannot be that of this strength, or nothing."""
        return overflow("strength times lora_alpha / lora_rank", strength * self.factor(), (mindspore.float32,))

    def _update(self) -> np.ndarray:
        """Return B A in the layout of the Parameter, in float64."""
        a, b = float64(self.mindpet_delta_lora_a), float64(self.mindpet_delta_lora_b)
        if self.mindpet_base.ndim == 2:
            return b @ a
        experts = self.mindpet_base.shape[0]
        product = b.reshape(-1, self.lora_rank, experts).transpose(2, 0, 1) @ a.reshape(experts, self.lora_rank, -1)
        return product.transpose(0, 2, 1) if is_turned(self) else product

    def delta_norm(self) -> float:
        """Return ||s B A||."""
        return float(self.factor() * np.linalg.norm(self._update()))

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return W + s B A at the strength of the running net."""
        with np.errstate(over="ignore", invalid="ignore"):
            whole = float64(self.mindpet_base) + float(self.scaling.asnumpy()) * self._update()
            return {self.mindpet_base: Tensor(whole.astype(np.float32)).astype(self.mindpet_base.dtype)}

    def plain_cell(self) -> nn.Cell:
        """Return the cell that this one is on."""
        return self._plain[0].set_train(self.training)  # type: ignore[attr-defined]

    def settings(self) -> dict[str, Any]:
        """Return lora_rank, lora_alpha, use_rslora where used, and the name of the Parameter."""
        return {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha, "lora_dropout": 0.0,
                **({"use_rslora": True} if self.use_rslora else {}), "target_parameter": self.target_parameter}

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return where the file is of another Parameter; alpha is taken over."""
        other = settings.get("target_parameter")
        return [] if other == self.target_parameter else [
            f"target_parameter is {self.target_parameter!r} in the net, {other!r} in the file."]

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over lora_alpha and use_rslora."""
        self.lora_alpha, self.use_rslora = settings["lora_alpha"], settings.get("use_rslora", False)
        self.refresh()


def is_turned(cell: nn.Cell) -> bool:
    """Tell whether a cell's stacks of matrices lie as (experts, in, out)."""
    return bool(getattr(cell, "is_transposed", not getattr(cell, "transpose_b", True)))


@functools.cache
def _kind(plain: Any, name: str, value: Any) -> type[nn.Cell]:
    """Return the class `plain` with `value` for what its attribute `name` gives."""
    attributes = {name: property(value), "__module__": plain.__module__}
    return type(f"LoRA{plain.__name__}", (LoRAParameter, plain), attributes)
