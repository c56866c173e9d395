"""The commands of `mindpet-lite`, thin over the package's functions; the only file that imports click."""
from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import click

from mindpet_lite import __version__, tasks
from mindpet_lite.tasks.options import PATHS, SETTINGS
from mindpet_lite.tasks.process import echo

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
_EXAMPLES = {
    "finetune": "-dp data -op out -bp train.py -pm base.ckpt -mc config.yaml -t 1d2h",
    "evaluate": "-dp data -cp out/delta.ckpt -op out -bp evaluate.py -t 30m",
    "infer": "-dp data -cp out/delta.ckpt -op out -bp infer.py -q",
}


@click.group(context_settings=_CONTEXT, no_args_is_help=False)
@click.version_option(__version__, prog_name="mindpet-lite")
def mindpet_lite() -> None:
    """Parameter-efficient tuning native to MindSpore and Ascend."""


@mindpet_lite.group(no_args_is_help=False, epilog=f"\b\nExample:\n  mindpet-lite run finetune {_EXAMPLES['finetune']}")
def run() -> None:
    """Run your own script as a task."""


def _task_command(task: Callable[..., tasks.TaskResult], summary: str) -> click.Command:
    """Return the command whose options are the parameters of a task."""
    def call(**arguments: Any) -> int:
        outcome = task(**arguments)
        if outcome.result is not None:
            echo(json.dumps(outcome.result, ensure_ascii=False) + "\n")
        return outcome.exit_code

    options: list[click.Parameter] = []
    for name, parameter in inspect.signature(task).parameters.items():
        option = {**PATHS, **SETTINGS}[name]
        spelling = [f"-{option.short}", f"--{name}"] if option.short else [f"--{name.replace('_', '-')}"]
        # None, not False: click 8.5 takes an explicit False to mean that the value may be left out.
        options.append(click.Option([*spelling, name], required=parameter.default is parameter.empty,
                                    is_flag=parameter.default is False or None, help=option.help))
    name = task.__name__
    return click.Command(name, params=options, callback=call, help=summary,
                         epilog=f"\b\nExample:\n  mindpet-lite run {name} {_EXAMPLES[name]}")


run.add_command(_task_command(tasks.finetune, "Run your training script."))
run.add_command(_task_command(tasks.evaluate, "Run your evaluation script; print its result."))
run.add_command(_task_command(tasks.infer, "Run your inference script; print its result."))
