"""Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning.

Wang et al., 2023, https://arxiv.org/abs/2303.02861, "prompt decomposition":

    [P_k; E[x]],    P_k = P ∘ (C_k R_k)        for a sequence of task k

P is shared by all tasks; C_k and R_k are of low rank, 1 in the paper. What source tasks trained is where a target task
starts from ("target adaptation").
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.arguments import check_int
from mindpet_lite.delta.adapted import Method
from mindpet_lite.delta.parts import as_type, prefix_of, put
from mindpet_lite.delta.values import setting_parameter
from mindpet_lite.delta.virtual_tokens import KEY, StartedTokensConfig, VirtualTokens, peft_method
from mindpet_lite.formats.files import as_float, open_tensors
from mindpet_lite.formats.peft_method import PeftMethod

_ROWS = "mindpet_delta_multitask_prompt_tuning_prompt"
_TASK_COLS, _TASK_ROWS = ("mindpet_delta_multitask_prompt_tuning_task_cols",
                          "mindpet_delta_multitask_prompt_tuning_task_rows")
_KEYS = {_ROWS: KEY, _TASK_COLS: "prefix_task_cols", _TASK_ROWS: "prefix_task_rows"}
_EXACT, _AVERAGE, _SHARED = _SOURCES = ("EXACT_SOURCE_TASK", "AVERAGE_SOURCE_TASKS", "ONLY_SOURCE_SHARED")
# What PEFT's config says of the start besides; a file holds the tensors, whatever they started as.
_WRITTEN = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None, "prompt_tuning_init_state_dict_path": None, "prompt_tuning_init_task": 0}


class MultitaskPromptTuning(VirtualTokens):
    """A table of tokens with rows before each sequence that its task has.

    `mindpet_delta_multitask_prompt_tuning_prompt` is P (num_virtual_tokens, size), `..._task_cols` C (num_tasks,
    num_virtual_tokens, num_ranks) and `..._task_rows` R (num_tasks, num_ranks, size). See `VirtualTokens` for shapes
    and types.

    The tasks of the sequences are `task_ids`, a Parameter that never trains: one number for all, 0 at first, or one for
    each sequence of a batch. `set_task_ids` writes it, and a compiled graph sees it at its next call. A net that knows
    the tasks of its batch may hand them to the layer instead: ``self.embed_tokens(ids, task_ids)``.
    """

    method = "multitask_prompt_tuning"

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of P, C and R."""
        width, rows = cls.outputs(layer), config.num_virtual_tokens
        config.check_size(width)
        return {_ROWS: (rows, width), _TASK_COLS: (config.num_tasks, rows, config.num_ranks),
                _TASK_ROWS: (config.num_tasks, config.num_ranks, width)}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return P by `prompt_tuning_init`, C and R from a normal distribution of deviation 0.02, as PEFT.

        What a file of source tasks has takes their place.
        """
        shapes = self.shapes(self, config)
        values = {name: 0.02 * np.random.standard_normal(shapes[name]) for name in (_TASK_COLS, _TASK_ROWS)}
        if config.prompt_tuning_init not in _SOURCES:
            return {_ROWS: self.first_rows(config), **values}
        values.update(_of_source(config))
        for name, value in values.items():
            if value.shape != shapes[name]:
                raise ValueError(f"{config.prompt_tuning_init} gives {_KEYS[name]} of shape {value.shape}, but these "
                                 f"settings have {shapes[name]}: use the num_virtual_tokens and num_ranks of the source"
                                 f"{'' if config.prompt_tuning_init == _SHARED else ', and num_tasks=1'}.")
        return values

    def add_parameters(self, trained: Mapping[str, Tensor], steering: Mapping[str, float]) -> None:
        """Make Parameters of what trains, and the one of the tasks."""
        super().add_parameters(trained, {})
        self.product = ops.BatchMatMul()
        self.tasks: tuple[int, ...] = (0,)
        self.setting_names = ("task_ids",)
        self._make_task_ids()

    def _make_task_ids(self) -> None:
        name = prefix_of(self.weight.name) + "task_ids"
        value = setting_parameter(Tensor(np.array(self.tasks, np.int32)), name)
        # A plain assignment would rename it.
        self.insert_param_to_cell("task_ids", value)

    def set_task_ids(self, task_ids: int | Sequence[int] | np.ndarray | Tensor) -> None:
        """Say of which task the sequences are, from the next call on.

        Nothing compiles again as long as the number of ids stays the same; another number of them does, as another
        size of a batch would.

        Args:
            task_ids: one number for all sequences, or one for each sequence of a batch.

        Raises:
            TypeError: an id is no int.
            ValueError: there is none, or it is not in [0, num_tasks).
        """
        given = task_ids.asnumpy() if isinstance(task_ids, Tensor) else np.asarray(task_ids)
        ids = given.reshape(-1).tolist()
        for item in ids:
            check_int("an entry of task_ids", item, 0)
        if not ids or max(ids) >= self.config.num_tasks:
            raise ValueError(f"task_ids must be numbers from 0 to {self.config.num_tasks - 1}, but got "
                             f"{task_ids!r:.100}.")
        before, self.tasks = self.tasks, tuple(ids)
        if len(before) == len(ids):
            put(self.task_ids, Tensor(np.array(ids, np.int32)))
            return
        self._make_task_ids()
        # A compiled graph would read the old ones.
        mindspore.ms_memory_recycle()

    def setting_values(self) -> dict[str, Any]:
        """Return the tasks."""
        return {"task_ids": np.array(self.tasks, np.int32)}

    def prompt_rows(self) -> Tensor:
        """Return the rows of the tasks in `task_ids`."""
        return self.rows_of(self.task_ids)

    def rows_of(self, task_ids: Tensor) -> Tensor:
        """Return P ∘ (C_k R_k) for each task k: (tasks, num_virtual_tokens, size)."""
        cols = ops.gather(self.mindpet_delta_multitask_prompt_tuning_task_cols, task_ids, 0)
        rows = ops.gather(self.mindpet_delta_multitask_prompt_tuning_task_rows, task_ids, 0)
        return self.mindpet_delta_multitask_prompt_tuning_prompt * self.product(cols, rows)

    def construct(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """Return the virtual tokens of each sequence's task and the rows of the ids.

        Args:
            x: ids `(batch, seq)`.
            task_ids: `(batch,)` or `(1,)`, in the place of the Parameter.
        """
        rows = self.plain(x)
        prompts = self.prompt_rows() if task_ids is None else self.rows_of(task_ids)
        if len(rows.shape) != 3 or prompts.shape[0] != 1 and prompts.shape[0] != rows.shape[0]:
            raise ValueError(f"Multitask prompt tuning takes ids (batch, seq) and one task for all sequences or one "
                             f"for each, but got ids of shape {x.shape} and {prompts.shape[0]} tasks: set_task_ids() "
                             f"of the layer says them.")
        prompts = ops.broadcast_to(as_type(prompts, rows.dtype), (rows.shape[0],) + prompts.shape[1:])
        return ops.concat((prompts, rows), 1)


def _of_source(config: Any) -> dict[str, np.ndarray]:
    """Return what `prompt_tuning_init` takes from the file of the source tasks, in PEFT's shapes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, or has no such task.
    """
    path, start = Path(config.prompt_tuning_init_state_dict_path), config.prompt_tuning_init
    with open_tensors(path) as file:
        missing = [key for key in _KEYS.values() if key not in file.keys()]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}: give the adapter_model.safetensors of an adapter of "
                             f"multitask prompt tuning.")
        source = {name: as_float(file.read(key)).astype(np.float32) for name, key in _KEYS.items()}
    shared, factors = {_ROWS: source.pop(_ROWS)}, source
    if start == _SHARED:
        return shared
    if start == _AVERAGE:
        return {**shared, **{name: value.mean(0, keepdims=True) for name, value in factors.items()}}
    task, tasks = config.prompt_tuning_init_task, len(factors[_TASK_COLS])
    if task >= tasks:
        raise ValueError(f"prompt_tuning_init_task is {task}, but {path} has the tasks 0 to {tasks - 1}.")
    return {**shared, **{name: value[task:task + 1] for name, value in factors.items()}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuningConfig(StartedTokensConfig):
    """Settings of multitask prompt tuning; the names are PEFT's. See `StartedTokensConfig` for the others.

    Args:
        num_tasks: how many tasks there are; positive. Default: 1.
        num_ranks: the rank of a task's own factors; positive. Default: 1.
        prompt_tuning_init: besides what `StartedTokensConfig` has, a start from an adapter of source tasks:
            "ONLY_SOURCE_SHARED" (P), and for one task P with the factors of a source task ("EXACT_SOURCE_TASK") or the
            mean of all ("AVERAGE_SOURCE_TASKS"). Default: "RANDOM".
        prompt_tuning_init_state_dict_path: the `adapter_model.safetensors` of the source tasks, for those.
            Default: None.
        prompt_tuning_init_task: number of the source task, 0 or more, for "EXACT_SOURCE_TASK". Default: 0.

    Raises:
        TypeError: a number or the path is none.
        ValueError: a number is too small; a field does not go with prompt_tuning_init.

    Examples:
        >>> import mindspore as ms
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Embedding(10, 4), nn.Dense(4, 2))
        >>> net = mp.get_pet_model(net, mp.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2))
        >>> net[0].set_task_ids([0, 1])
        >>> net(ms.Tensor([[1, 2], [3, 4]])).shape
        (2, 5, 2)
    """

    pet_type: ClassVar[str] = "multitask_prompt_tuning"
    layer: ClassVar[type[Method]] = MultitaskPromptTuning
    title: ClassVar[str] = "Multitask prompt tuning"
    peft: ClassVar[PeftMethod] = peft_method(PeftMethod, "MULTITASK_PROMPT_TUNING", _KEYS,
                                             {"num_tasks": 1, "num_ranks": 1}, _WRITTEN)
    inits: ClassVar[tuple[str, ...]] = (*StartedTokensConfig.inits, *_SOURCES)

    num_tasks: int = 1
    num_ranks: int = 1
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_tasks", "num_ranks"):
            check_int(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))
        check_int("prompt_tuning_init_task", self.prompt_tuning_init_task, 0)
        path, start = self.prompt_tuning_init_state_dict_path, self.prompt_tuning_init
        if path is not None and not isinstance(path, str):
            raise TypeError(f"prompt_tuning_init_state_dict_path must be a path as text, but got {path!r:.100}.")
        if (start in _SOURCES) != bool(path):
            raise ValueError(f"prompt_tuning_init_state_dict_path and a prompt_tuning_init of {', '.join(_SOURCES)} go "
                             f"together, but got {path!r:.100} and {start!r}.")
        if self.prompt_tuning_init_task and start != _EXACT:
            raise ValueError(f"prompt_tuning_init_task is for prompt_tuning_init={_EXACT!r}, but that is {start!r}.")
