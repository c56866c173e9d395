"""Checkpoints of what trains, written while `Model.train` runs."""
from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore
from mindspore import Parameter, nn
from mindspore.train import Callback, CheckpointConfig

from mindpet_lite.arguments import WrongArgumentError
from mindpet_lite.formats.atomic import atomic_file
from mindpet_lite.formats.mindpet import SETTINGS_KEY
from mindpet_lite.graph.adapters import bring_up_to_date, deltas_in
from mindpet_lite.graph.optimizer import check_optimizers_of
from mindpet_lite.graph.tree import cells_by_path


class TrainableParamsCheckPoint(Callback):
    """Callback for `Model.train` that saves only the trainable parameters of the network, as MindPet's.

    Writes ``<prefix>-<epoch>_<step>.ckpt`` with the parameters of the network that train, by `Parameter.name`: no
    frozen weight, no optimizer state. Under the key ``mindpet_lite`` the file holds a JSON text with the method, rank,
    alpha and dropout of each adapted layer, by its path. `mindpet_lite.load_adapter` reads the file, and so do
    ``mindspore.load_checkpoint`` and ``load_param_into_net`` with an adapted net.

    Args:
        directory: where to write; absolute or relative to the working directory; made if missing.
        prefix: start of the file names. Default: "DELTA_CKP".
        config: mindspore.train.CheckpointConfig; `save_checkpoint_steps`, `save_checkpoint_seconds`,
            `keep_checkpoint_max`, `keep_checkpoint_per_n_minutes`, `append_info` and `saved_network` are honoured.
            Default: None, which saves at the end of every epoch and keeps the last 5.

    Raises:
        TypeError: `directory` is no path, `prefix` no string, `config` no CheckpointConfig.
        ValueError: `directory` or `prefix` is None or empty, or `prefix` holds a path separator; or `config` asks for
            encryption or files of another format. When the training begins: nothing in the network trains, or as
            `mindpet_lite.check_optimizer`.

    Examples:
        >>> from pathlib import Path
        >>> import mindspore as ms
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> data = [(np.ones(4, np.float32), np.ones(2, np.float32))] * 6
        >>> data = ms.dataset.GeneratorDataset(data, ["x", "y"]).batch(3)
        >>> model = ms.Model(net, nn.MSELoss(), nn.Adam(net.trainable_params(), 1e-3))
        >>> model.train(1, data, mp.TrainableParamsCheckPoint("deltas"), dataset_sink_mode=False)
        >>> [path.name for path in Path("deltas").glob("*.ckpt")]
        ['DELTA_CKP-1_2.ckpt']
    """

    def __init__(self, directory: str | os.PathLike[str], prefix: str = "DELTA_CKP",
                 config: CheckpointConfig | None = None) -> None:
        super().__init__()
        if not isinstance(directory, (str, os.PathLike)):
            raise WrongArgumentError(f"directory must be a path to write checkpoints to, but got {directory!r:.100}.")
        if not os.fspath(directory):
            raise ValueError("directory must be a path to write checkpoints to, but got an empty string.")
        if not isinstance(prefix, str):
            raise WrongArgumentError(f"prefix must be a string, but got {prefix!r:.100}.")
        if not prefix or os.path.basename(prefix) != prefix:
            raise ValueError(f"prefix must be the start of a file name, but got {prefix!r:.100}.")
        if config is not None and not isinstance(config, CheckpointConfig):
            raise TypeError(f"config must be a mindspore.train.CheckpointConfig, but got {type(config).__name__}.")
        if config is not None and config.enc_key:
            raise ValueError("TrainableParamsCheckPoint does not support enc_key of CheckpointConfig.")
        file_format = getattr(config, "format", "ckpt")
        if file_format != "ckpt":
            raise ValueError(f"TrainableParamsCheckPoint writes format 'ckpt', but config says {file_format!r:.100}.")
        self.directory, self.prefix, self.config = Path(directory), prefix, config
        self._written: dict[Path, float] = {}
        self._first_step, self._last_step, self._last_time = 0, 0, time.monotonic()

    def on_train_begin(self, run_context: Any) -> None:
        """Check the optimizer, and that there is something to save and somewhere to save it, before the first step."""
        params = run_context.original_args()
        network = params.network or params.train_network
        # Where nothing trains, that is the fault to speak of.
        if network.trainable_params():
            check_optimizers_of(network, params)
        trainable_parameters(self._network(params))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._first_step = self._last_step = params.cur_step_num
        self._last_time = time.monotonic()

    def on_train_step_end(self, run_context: Any) -> None:
        """Save when the config's steps or seconds have gone by; without a config at the end of each epoch."""
        params = run_context.original_args()
        if self._due(params):
            self._save(params)

    def on_train_end(self, run_context: Any) -> None:
        """Save the last state, also where the last step was saved: accumulated gradients may have come after it."""
        params = run_context.original_args()
        if params.cur_step_num > self._first_step:
            self._save(params)

    def _due(self, params: Any) -> bool:
        steps = self.config.save_checkpoint_steps if self.config else None
        seconds = self.config.save_checkpoint_seconds if self.config else None
        if steps:
            return params.cur_step_num >= self._last_step + steps
        if seconds:
            return time.monotonic() >= self._last_time + seconds
        return params.cur_step_num % params.batch_num == 0

    def _network(self, params: Any) -> nn.Cell:
        return (self.config.saved_network if self.config else None) or params.network or params.train_network

    def _save(self, params: Any) -> None:
        epoch_step = (params.cur_step_num - 1) % params.batch_num + 1
        path = self.directory / f"{self.prefix}-{params.cur_epoch_num}_{epoch_step}.ckpt"
        save_trainable(self._network(params), path, self._more(params))
        self._last_step, self._last_time = params.cur_step_num, time.monotonic()
        self._written = {other: when for other, when in self._written.items() if other != path}
        self._written[path] = self._last_time
        for old in self._superseded():
            old.unlink(missing_ok=True)
            del self._written[old]

    def _superseded(self) -> list[Path]:
        """Return the files that the config does not keep now that there is a newer one."""
        *older, newest = self._written
        minutes = self.config.keep_checkpoint_per_n_minutes if self.config else None
        if minutes:
            return [path for path in older if self._written[newest] - self._written[path] < 60 * minutes]
        keep = self.config.keep_checkpoint_max if self.config else 5
        return older[:max(0, len(self._written) - keep)] if keep else []

    def _more(self, params: Any) -> dict[str, Any]:
        """Return the entries of the config's `append_info`; the numbers count on from what it says."""
        more = dict(self.config.append_dict or {}) if self.config else {}
        for name, now in (("epoch_num", params.cur_epoch_num), ("step_num", params.cur_step_num)):
            if name in more:
                more[name] += now
        return more


def save_trainable(network: nn.Cell, path: Path, more: Mapping[str, Any]) -> None:
    """Write the trainable parameters of `network` and the settings of its deltas to a ``.ckpt`` file, atomically.

    Args:
        network: whose parameters.
        path: of the file.
        more: other entries to write, by name.

    Raises:
        ValueError: the network has no trainable parameter.
        OSError: the file cannot be written; what was there is unchanged.
    """
    chosen = trainable_parameters(network)
    found = deltas_in(cells_by_path(network))
    bring_up_to_date(found)
    layers: dict[str, dict[str, Any]] = {
        place: {"method": cell.method, "settings": cell.settings(),
                "parameters": {own: parameter.name for own, parameter in cell.delta_parameters().items()}}
        for place, cell in found.items()}
    own = {name for layer in layers.values() for name in layer["parameters"].values()}
    trained = {parameter.name for parameter in chosen} - own
    entry = {"layers": layers, "trained": sorted(trained), "more": sorted(more), "config": {}} \
        if trained or more else layers
    with atomic_file(path) as temporary:
        try:
            mindspore.save_checkpoint([{"name": parameter.name, "data": parameter} for parameter in chosen],
                                      str(temporary), append_dict={**more, SETTINGS_KEY: json.dumps(entry)})
        except RuntimeError as error:
            raise OSError(str(error)) from error


def trainable_parameters(network: nn.Cell) -> list[Parameter]:
    """Return the Parameters that train in `network`; for a training step, those that its optimizers were given.

    Raises:
        ValueError: there is none.
    """
    optimizers = [cell for cell in cells_by_path(network).values() if isinstance(cell, nn.Optimizer)]
    candidates = [parameter for optimizer in optimizers for parameter in optimizer.parameters] \
        if optimizers else network.trainable_params()
    found = list({id(parameter): parameter for parameter in candidates if parameter.requires_grad}.values())
    if not found:
        raise ValueError("The network has no trainable parameter to save: call freeze_delta() or get_pet_model() "
                         "before training.")
    return found
