"""Watch the deltas while `Model.train` runs."""
from __future__ import annotations

import math
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.train import Callback

from mindpet_lite.arguments import check_int, check_number, warn_user
from mindpet_lite.delta.base import Delta, float64
from mindpet_lite.graph.adapters import deltas
from mindpet_lite.graph.optimizer import check_optimizers_of
from mindpet_lite.graph.tree import cells_by_path, require_cell


class HealthCallback(Callback):
    """Callback for `Model.train` that reads the deltas now and then, and stops a training that is lost.

    - `norms` holds for each read, by its step, the size of each layer's delta by its path: ||s B A|| for LoRA, else
      the root of the sum of the squares of what the method trains.
    - A trainable Parameter of a delta that is still all zeros after `zero_after` steps (LoRA's B, which starts so) got
      no gradient: a warning names it.
    - A delta with NaN or infinite values, or a loss that is not finite where no dynamic loss scale is there to mend it,
      ends the training with an error.
    - So does a dynamic loss scale that has come down to `scale_floor`: every step overflows.

    The host reads the values at the first step's begin, then every `every` steps, after `zero_after` steps and at the
    end; all other steps cost nothing.

    Args:
        every: steps between two reads; positive. Default: 100.
        zero_after: steps after which no delta may be all zeros; positive. Default: 100.
        scale_floor: the lowest loss scale. MindSpore's never go below 1. Default: 1.0.
        network: whose deltas, by the paths in it; without it the network that the Model was given. Default: None.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a number is not positive. When the training begins: the network has no adapted layer, or as
            `mindpet_lite.check_optimizer`.
        FloatingPointError: in the training, for the reasons above; names the parameter by its path.

    Examples:
        >>> import mindspore as ms
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> data = [(np.ones(4, np.float32), np.ones(2, np.float32))] * 6
        >>> data = ms.dataset.GeneratorDataset(data, ["x", "y"]).batch(3)
        >>> model = ms.Model(net, nn.MSELoss(), nn.Adam(net.trainable_params(), 1e-3))
        >>> health = mp.HealthCallback(every=1)
        >>> model.train(1, data, health, dataset_sink_mode=False)
        >>> list(health.norms[2])                  # the sizes of the deltas after step 2, by layer
        ['0']
    """

    def __init__(self, every: int = 100, zero_after: int = 100, scale_floor: float = 1.0,
                 network: nn.Cell | None = None) -> None:
        super().__init__()
        check_int("every", every)
        check_int("zero_after", zero_after)
        if not check_number("scale_floor", scale_floor) > 0:
            raise ValueError(f"scale_floor must be above 0, but got {scale_floor}.")
        self.every, self.zero_after, self.scale_floor = every, zero_after, float(scale_floor)
        self.network = None if network is None else require_cell(network)
        self.norms: dict[int, dict[str, float]] = {}
        self._deltas: dict[str, Delta] = {}
        self._scale: Parameter | None = None
        self._highest_scale = 0.0
        self._last_step = self._zero_due = 0

    def on_train_begin(self, run_context: Any) -> None:
        """Check the optimizer, find the deltas and the loss scale, and read them for the first time."""
        params = run_context.original_args()
        network = self.network or params.network or params.train_network
        self._deltas = deltas(network)
        check_optimizers_of(network, params)
        self._scale, self._highest_scale = dynamic_loss_scale(params.train_network or params.network), 0.0
        self._zero_due = params.cur_step_num + self.zero_after
        self._read(params.cur_step_num, None)

    def on_train_step_end(self, run_context: Any) -> None:
        """Read where a read is due."""
        params = run_context.original_args()
        step = params.cur_step_num
        if step >= self._last_step + self.every or self._last_step < self._zero_due <= step:
            self._read(step, params.net_outputs)

    def on_train_end(self, run_context: Any) -> None:
        """Read what the last steps left."""
        params = run_context.original_args()
        if params.cur_step_num > self._last_step:
            self._read(params.cur_step_num, params.net_outputs)

    def _read(self, step: int, outputs: Any) -> None:
        values = {f"{path}.{name}" if path else name: (item, float64(item)) for path, delta in self._deltas.items()
                  for name, item in delta.delta_parameters().items()}
        broken = [path for path, (_, value) in values.items() if not np.isfinite(value).all()]
        if broken:
            when = f"between steps {self._last_step} and {step}" if step > self._last_step else "before the training"
            raise FloatingPointError(
                f"{_some(broken)} became NaN or infinite {when}: start again from the last good adapter, with a lower "
                f"learning rate, clipping (clip_global_norm), or in float16 a loss scale.")
        self._check_loss(step, outputs)
        self._check_scale(step)
        zeros = [path for path, (item, value) in values.items() if item.requires_grad and not value.any()]
        if zeros and self._last_step < self._zero_due <= step:
            warn_user(f"{_some(zeros)} is still zero after {self.zero_after} steps, so it gets no gradient or is not "
                      f"trained: make the optimizer after the layers are adapted, from net.trainable_params(), and see "
                      f"whether the layer is used in the loss.")
        self.norms[step] = {path: delta.delta_norm() for path, delta in self._deltas.items()}
        self._last_step = step

    def _check_loss(self, step: int, outputs: Any) -> None:
        """Raise where a step's output, or the first of several, is a loss that is not finite."""
        loss = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
        if self._scale is None and isinstance(loss, Tensor) and not np.isfinite(float64(loss)).all():
            raise FloatingPointError(f"The loss is {float64(loss).mean()} at step {step}, while all deltas are finite: "
                                     f"look at the data of this step and at the base's weights.")

    def _check_scale(self, step: int) -> None:
        if self._scale is None:
            return
        scale = float(float64(self._scale).max())
        self._highest_scale = max(self._highest_scale, scale)
        if not math.isfinite(scale) or scale <= self.scale_floor < self._highest_scale:
            raise FloatingPointError(
                f"The dynamic loss scale came down to {scale:g} by step {step}, its floor being {self.scale_floor:g}: "
                f"every step overflows and none trains. Lower the learning rate, or compute in float32 or bfloat16.")


def dynamic_loss_scale(network: nn.Cell) -> Parameter | None:
    """Return the Parameter with the dynamic loss scale of a training step, or None where there is none."""
    for cell in cells_by_path(network).values():
        if isinstance(getattr(cell, "loss_scaling_manager", None), nn.DynamicLossScaleUpdateCell):
            return cell.scale_sense
        for value in vars(cell).values():
            if isinstance(value, mindspore.amp.DynamicLossScaler):
                return value.scale_value
    return None


def _some(paths: list[str]) -> str:
    """Return the first paths of a list, and how many more there are."""
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
