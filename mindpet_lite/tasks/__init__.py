"""Run your own training, evaluation or inference script as a task, as `mindpet finetune|evaluate|infer` does."""
from mindpet_lite.tasks.task import TaskResult, evaluate, finetune, infer

__all__ = ["TaskResult", "evaluate", "finetune", "infer"]
