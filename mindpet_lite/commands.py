"""The commands of `mindpet-lite`, thin over the package's functions."""
from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import click

from mindpet_lite import __version__, tasks
from mindpet_lite.command_parts import JSON, FileCommand, NewFolder, Place, tell, warnings_as_lines
from mindpet_lite.estimate import as_dict, estimate
from mindpet_lite.estimate import table as plan_table
from mindpet_lite.estimate.plan import ITEMS, OPTIMIZERS
from mindpet_lite.formats.adapters import LORA, TARGETS, Methods
from mindpet_lite.formats.combine import SIGNS, WAYS
from mindpet_lite.formats.detect import FORMATS
from mindpet_lite.formats.directory import CONFIG_FILE, read_config
from mindpet_lite.formats.files import open_regular
from mindpet_lite.formats.quantised import KINDS
from mindpet_lite.formats.strict_json import parse_object
from mindpet_lite.names.components import COMPONENTS
from mindpet_lite.names.table import Table, check_table
from mindpet_lite.offline import extract as extraction
from mindpet_lite.offline import inspect as inspection
from mindpet_lite.offline.combine import combine_files
from mindpet_lite.offline.convert import convert
from mindpet_lite.offline.merge import merge
from mindpet_lite.offline.quantise import quantise_files
from mindpet_lite.pet_block import pet_block
from mindpet_lite.tasks.options import PATHS, SETTINGS
from mindpet_lite.tasks.process import echo
from mindpet_lite.yaml_files import read_yaml

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
    def call(as_json: bool, **arguments: Any) -> int:
        # What the script prints is no JSON.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            outcome = task(**arguments)
        if as_json:
            tell("", {"exit_code": outcome.exit_code, "output_path": outcome.output_path, "result": outcome.result},
                 as_json)
        elif outcome.result is not None:
            echo(json.dumps(outcome.result, ensure_ascii=False) + "\n")
        return outcome.exit_code

    options: list[click.Parameter] = []
    for name, parameter in inspect.signature(task).parameters.items():
        option = {**PATHS, **SETTINGS}[name]
        spelling = [f"-{option.short}", f"--{name}"] if option.short else [f"--{name.replace('_', '-')}"]
        # None, not False: click 8.5 takes an explicit False to mean that the value may be left out.
        options.append(click.Option([*spelling, name], required=parameter.default is parameter.empty,
                                    is_flag=parameter.default is False or None, help=option.help))
    options.append(click.Option(["--json", "as_json"], is_flag=True,
                                help="Print how it ended as JSON, and the script's output on standard error."))
    name = task.__name__
    return click.Command(name, params=options, callback=call, help=summary,
                         epilog=f"\b\nExample:\n  mindpet-lite run {name} {_EXAMPLES[name]}")


run.add_command(_task_command(tasks.finetune, "Run your training script."))
run.add_command(_task_command(tasks.evaluate, "Run your evaluation script; print its result."))
run.add_command(_task_command(tasks.infer, "Run your inference script; print its result."))


_PATH, _NEW = Place(path_type=Path), NewFolder(path_type=Path)
_FROM = click.option("--from", "kind", type=click.Choice(FORMATS), help="The adapter's format; detected without it.")
_NAMES = click.option("--names", type=_PATH, help="YAML or JSON file: names of layers in the result by those in the "
                                                  "adapter, or 'patterns'.")
_COMPONENT = click.option("--component", type=click.Choice(COMPONENTS), help="Of a diffusion pipeline: its part of an "
                          "adapter of several, or the one that the adapter is of.")
_QUIET = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")


def _table(path: Path | None) -> Table | None:
    """Return the names in a file: a mapping, or under `patterns` pairs of a regular expression and its replacement."""
    if path is None:
        return None
    found = read_yaml(path)
    if not found:
        raise ValueError(f"{path} names no layer: give names of layers by those in the adapter, or 'patterns'.")
    table = found["patterns"] if set(found) == {"patterns"} and isinstance(found["patterns"], list) else found
    try:
        check_table(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return table


@mindpet_lite.command("inspect", cls=FileCommand, epilog="\b\nExample:\n  mindpet-lite inspect adapter/")
@click.argument("path", type=_PATH)
@_FROM
@JSON
def _inspect(path: Path, kind: str | None, as_json: bool) -> None:
    """Print what the adapter at PATH is: format, method, layers, ranks, alphas, sizes, norms."""
    from mindpet_lite.delta import METHODS  # loads MindSpore, for which the other commands need not wait
    report = inspection.inspect(path, kind, METHODS)
    tell(inspection.table(report), report, as_json)


def _methods_of(adapter: Path) -> Methods:
    """Return the methods that an adapter may be of: LoRA alone where its config says so, or it has none."""
    config = adapter / CONFIG_FILE
    if not config.is_file():
        return LORA
    with open_regular(config) as handle:
        if read_config(handle, config).get("peft_type") == "LORA":
            return LORA
    from mindpet_lite.delta import METHODS  # loads MindSpore, for which LoRA's merge need not wait
    return METHODS


@mindpet_lite.command("merge", cls=FileCommand, epilog="\b\nExample:\n  mindpet-lite merge --base llama/ --adapter "
                                                       "adapter/ --out llama-merged/")
@click.option("--base", required=True, type=_PATH, help="Directory or file: safetensors, shards, or .ckpt.")
@click.option("--adapter", required=True, type=_PATH, help="An adapter of any format.")
@click.option("--out", required=True, type=_NEW, help="New directory for the merged model.")
@_FROM
@_NAMES
@_COMPONENT
@click.option("--strict-base", is_flag=True, help="Refuse an adapter that was trained on another base.")
@_QUIET
@JSON
def _merge(base: Path, adapter: Path, out: Path, kind: str | None, names: Path | None, component: str | None,
           strict_base: bool, quiet: bool, as_json: bool) -> None:
    """Write a base with an adapter merged into its weights, file to file."""
    with warnings_as_lines():
        done = merge(base, adapter, out, kind, _table(names), strict_base, quiet, component, _methods_of(adapter))
    for path in done.left_behind:
        sys.stderr.write(f"mindpet-lite: {path} was left behind: it is not merged.\n")
    tell(f"merged {len(done.changed)} of {done.tensors} tensors into {out}\n", dataclasses.asdict(done), as_json)


@mindpet_lite.command("combine", cls=FileCommand, epilog="\b\nExamples:\n"
                                       "  mindpet-lite combine style/=0.7 subject/=0.5 --out both/\n"
                                       "  mindpet-lite combine a/=1 b/=-0.5 --how ties --density 0.5 --out both/")
@click.argument("parts", nargs=-1, required=True, metavar="ADAPTER=WEIGHT ...")
@click.option("--out", required=True, type=_NEW, help="New directory for the result, as PEFT has it.")
@click.option("--how", type=click.Choice(WAYS), default="svd", show_default=True, help="The way of combining.")
@click.option("--rank", type=click.IntRange(min=1), help="Of the result, for svd; the adapters' highest without it.")
@click.option("--density", type=click.FloatRange(0, 1, min_open=True), help="The share of numbers that pruning leaves.")
@click.option("--sign", type=click.Choice(SIGNS), default="total", show_default=True,
              help="What makes a sign the stronger, for ties.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of dare's random numbers.")
@JSON
def _combine(parts: tuple[str, ...], out: Path, how: str, rank: int | None, density: float | None, sign: str,
             seed: int, as_json: bool) -> None:
    """Write one LoRA adapter made of several, each with its weight."""
    with warnings_as_lines():
        done = combine_files(parts, out, how, rank, density, sign, seed)
    adapters = [{"path": path, "weight": float(weight)} for path, _, weight in (text.rpartition("=") for text in parts)]
    tell(f"combined {len(parts)} adapters into {out}: {len(done.layers)} layers\n",
         {"out": out, "adapters": adapters, "how": how, "layers": list(done.layers)}, as_json)


@mindpet_lite.command("convert", cls=FileCommand, epilog="\b\nExamples:\n"
                                       "  mindpet-lite convert adapter/ adapter.safetensors --to kohya\n"
                                       "  mindpet-lite convert lora.safetensors adapter/ --to peft --base unet/\n"
                                       "  mindpet-lite convert delta.ckpt adapter/ --to mindformers --names names.yaml")
@click.argument("source", metavar="SRC", type=_PATH)
@click.argument("target", metavar="DST", type=_PATH)
@click.option("--to", required=True, type=click.Choice(TARGETS), help="The format of DST.")
@_FROM
@_NAMES
@_COMPONENT
@click.option("--base", type=_PATH, help="The base whose layers' names DST gets.")
@JSON
def _convert(source: Path, target: Path, to: str, kind: str | None, names: Path | None, component: str | None,
             base: Path | None, as_json: bool) -> None:
    """Write the adapter at SRC to DST in another format, all of it or nothing."""
    from mindpet_lite.delta import METHODS  # as in inspect
    done = convert(source, target, to, kind, _table(names), base, METHODS, component)
    tell(f"converted {done.layers} layers from {done.kind} to {to}: {', '.join(map(str, done.files))}\n",
         {"from": done.kind, "to": to, "layers": done.layers, "files": done.files}, as_json)


@mindpet_lite.command("extract", cls=FileCommand, epilog="\b\nExample:\n  mindpet-lite extract --base llama/ --tuned "
                                                         "tuned/ --rank 16 --out adapter/")
@click.option("--base", required=True, type=_PATH, help="Directory or file: safetensors, shards, or .ckpt.")
@click.option("--tuned", required=True, type=_PATH, help="The same net after tuning, likewise.")
@click.option("--rank", required=True, type=click.IntRange(min=1), help="The adapter's rank in each layer, at most.")
@click.option("--out", type=_NEW, help="New directory for the adapter, as PEFT has it; written only with this.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of the decomposition of large matrices.")
@_QUIET
@JSON
def _extract(base: Path, tuned: Path, rank: int, out: Path | None, seed: int, quiet: bool, as_json: bool) -> None:
    """Print the error that a LoRA adapter leaves of what tuning changed, and write the adapter."""
    found = extraction.extract(base, tuned, rank, out, seed, quiet)
    tell(extraction.table(found), {"out": out, **extraction.as_dict(found)}, as_json)


_EXPRESSION = set("*|\\[](){}^$+?")


def _targets(text: str | None) -> str | list[str] | None:
    """Return `target_modules` as a config has it: names separated by commas, or an expression."""
    return text if text is None or text == "all-linear" or _EXPRESSION & set(text) else text.split(",")


@mindpet_lite.command("quantize", cls=FileCommand, epilog="\b\nExamples:\n"
                                        "  mindpet-lite quantize --base llama/ --kind nf4 --out llama-nf4/\n"
                                        "  mindpet-lite quantize --base model.gguf --kind q8_0 --out model-q8/")
@click.option("--base", required=True, type=_PATH, help="Directory or file: safetensors, shards, .ckpt, or .gguf.")
@click.option("--kind", required=True, type=click.Choice(KINDS), help="int8 for each output, int8 for each 32 inputs "
                                                                      "as GGUF has it, or NormalFloat-4.")
@click.option("--out", required=True, type=_NEW, help="New directory for the quantised model.")
@click.option("--targets", default="all-linear", show_default=True, help="Layers: names and commas, or an expression.")
@_QUIET
@JSON
def _quantize(base: Path, kind: str, out: Path, targets: str, quiet: bool, as_json: bool) -> None:
    """Write a base with its linear layers in 8 or 4 bits, file to file, for a net of quantize_base()."""
    done = quantise_files(base, kind, out, _targets(targets) or targets, quiet)
    for path in done.left_behind:
        sys.stderr.write(f"mindpet-lite: {path} was left behind: it is not quantised.\n")
    for name, count in done.rounded_again.items():
        why = ("has a minimum for each block, for which no kind has a place" if name == "Q4_1" else
               f"is kept without loss by --kind q8_0 alone, not by {kind}")
        sys.stderr.write(f"mindpet-lite: {count} tensors are {name}, which {why}: they were rounded once more.\n")
    worst = max(done.errors, key=lambda item: done.errors[item])
    lost = f"rounding changed {done.errors[worst]:.2%} of a weight at most, {worst}" if done.errors[worst] else \
        "nothing was lost"
    tell(f"quantised {len(done.errors)} of {done.tensors} tensors into {out}: {done.after / 1e6:,.1f} MB after "
         f"{done.before / 1e6:,.1f} MB of numbers; {lost}\n", {"kind": kind, **dataclasses.asdict(done)}, as_json)


def _model_config(path: Path) -> dict[str, Any]:
    if path.suffix.lower() != ".json":
        return read_yaml(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config at {path}: check the path.")
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


@mindpet_lite.command("estimate", cls=FileCommand, epilog="\b\nExamples:\n"
                                        "  mindpet-lite estimate --config llama/config.json --batch 4 --seq 1024\n"
                                        "  mindpet-lite estimate --config qwen2/config.json --batch 4 --seq 1024 "
                                        "--dtype float16 --quantize nf4\n"
                                        "  mindpet-lite estimate --config wukong_full_lora.yaml --batch 3")
@click.option("--config", required=True, type=_PATH, help="A Llama's config.json, the YAML of examples/wukong, or "
                                                          "MindFormers' YAML of a Llama.")
@click.option("--batch", required=True, type=click.IntRange(min=1), help="Samples of a step.")
@click.option("--seq", type=click.IntRange(min=1), help="Tokens of a sample; of a U-Net, words of its text.")
@click.option("--lora-rank", type=click.IntRange(min=1), help="LoRA's rank; the config's or 8 without it.")
@click.option("--target-modules", help="Layers with LoRA: names and commas, an expression, or all-linear; the "
                                       "config's or the attention's without it.")
@click.option("--lora-dropout", type=click.FloatRange(0, 1, max_open=True),
              help="LoRA's dropout; the config's or 0 without it.")
@click.option("--dtype", type=click.Choice(list(ITEMS)), default="float32", show_default=True,
              help="Of weights and activations; what trains is float32.")
@click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)), default="adamw", show_default=True,
              help="Its state is kept for what trains.")
@click.option("--quantize", type=click.Choice(KINDS), help="How LoRA's base holds its linear layers' weights but the "
                                                           "head's; as they are without it.")
@JSON
def _estimate(config: Path, batch: int, seq: int | None, lora_rank: int | None, target_modules: str | None,
              lora_dropout: float | None, dtype: str, optimizer: str, quantize: str | None, as_json: bool) -> None:
    """Print the memory that training a model takes, with LoRA and in full, with and without recomputation."""
    document = _model_config(config)
    try:
        if pet_block(document) is not None:
            from mindpet_lite.config import as_config  # loads MindSpore, for which other configs need not wait
            as_config(document)
        report = estimate(document, batch, seq, lora_rank, _targets(target_modules), lora_dropout, dtype, optimizer,
                          quantize)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config}: {error}") from error
    tell(plan_table(report), as_dict(report), as_json)
