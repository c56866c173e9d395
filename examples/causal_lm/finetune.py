"""Tunes a language model on instructions with LoRA or another method of mindpet_lite.

    python finetune.py                                                  # SmolLM2 on data/train.jsonl, on CPU
    python finetune.py --data my.jsonl --rank 16 --targets q_proj v_proj --epochs 2 --out /tmp/mine
    python finetune.py --config configs/mindformers_lora.yaml --data my.jsonl       # as MindFormers has it
    python finetune.py --base my/Qwen2-0.5B --data chats.json --save-every 100
    python finetune.py --base my/Qwen2-0.5B --data chats.json --save-every 100 --resume
    python finetune.py --base my/Qwen2-0.5B --data chats.json --quantize nf4
    msrun --worker_num=2 --local_worker_num=2 --join=True finetune.py --parallel=data --data=my.jsonl
    msrun --worker_num=2 --local_worker_num=2 --join=True finetune.py --parallel=tensor --clip-norm=0 --base=my/Qwen2-7B

Data is JSON or JSONL: objects with instruction, input and output, or with messages. The loss is that of the answers.
The run writes into --out: adapter/ (PEFT's layout), report.html, log.jsonl, settings.yaml, results.json, answers.json,
loss.png, and with --save-every checkpoints/. Ctrl-C and SIGTERM save a checkpoint first; --resume goes on from it.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

# First, to say which packages are missing.
from common import CHECKPOINTS, Parser, UserError, check, clear, explained, lasting, run_script, save_settings  # isort: skip
import mindspore as ms
import numpy as np
import processes
from bases import Base, load_base
from batches import Batches, Bucket, drawn, encode
from generation import Generator
from instructions import Sample, read_samples
from loop import Evaluation, Run, make_step, say, train
from mindspore import Tensor, nn
from options import Settings, add_flags, read
from page import Answered, save_curve, save_results
from targets import check_sizes, config_for
from tqdm import tqdm

from mindpet_lite import TrainingState, freeze_delta, get_pet_model, net_recompute, quantize_base, save_adapter
from mindpet_lite.graph import TrainableReport
from mindpet_lite.train import Ranks

BLOCKS = r"model\.layers\.\d+"
# When a run goes on, besides what `common.lasting` leaves out.
MAY_CHANGE = ("answers", "answer_length")


def read_data(path: Path, base: Base, settings: Settings, least: int, ranks: Ranks
              ) -> tuple[list[Sample], list[Bucket]]:
    """The samples of a file that can be used, as they are and by length; says how many were left out, and why."""
    samples, unread = read_samples(path)
    lengths = [length for length in settings.padded() if length <= base.net.sizes.context]
    with explained(str(path), UserError):
        buckets, unfit = encode(samples, base.chat, lengths or [base.net.sizes.context], least)
    skipped = unread + [f"{where}: {why}" for where, why in unfit.items()]
    say(ranks, f"{path}: {sum(len(one.places) for one in buckets)} samples"
               + (f", {len(skipped)} left out" if skipped else "")
               + "; padded to " + ", ".join(f"{one.length} ({len(one.places)})" for one in buckets))
    for message in skipped[:10]:
        say(ranks, f"  left out: {message}")
    return [sample for sample in samples if sample.where not in unfit], buckets


def quantise(net: nn.Cell, settings: Settings, buckets: Sequence[Bucket]) -> None:
    """Holds the weights of the layers in few bits; training samples choose the codes."""
    layers = BLOCKS + r"\..*_proj"
    if not settings.calibrate:
        quantize_base(net, settings.quantize, layers)
        return
    chosen = drawn(buckets, settings.calibrate, settings.batch_size, settings.seed)
    with tqdm(total=len(chosen), desc="choosing codes", unit="batch") as bar:

        def forward(own: nn.Cell, batch: dict[str, np.ndarray]) -> None:
            own.model(Tensor(batch["ids"]))
            bar.update()

        quantize_base(net, settings.quantize, layers, chosen, forward)


def adapt(net: nn.Cell, settings: Settings, buckets: Sequence[Bucket]) -> TrainableReport:
    """Puts the method into the net, and freezes the rest.

    Args:
        net: The model.
        settings: The run's.
        buckets: The training samples.

    Raises:
        UserError: The targets hit nothing, or something that cannot be adapted.
    """
    check_sizes(net, settings.model_config)
    config = config_for(net, settings.pet_config)
    if settings.parallel == "tensor":
        processes.split(net)
    with explained("the adapter cannot be put into the model", ValueError, TypeError):
        if settings.quantize != "none":
            quantise(net, settings, buckets)
        get_pet_model(net, config)
        if settings.recompute:
            net_recompute(net, BLOCKS)
        return freeze_delta(net, config.pet_type)


class Answering:
    """Answers held-out prompts, compiled once for before and after.

    Args:
        base: The model, adapted.
        samples: Whose prompts are answered.
        new: Tokens of an answer at most.
    """

    def __init__(self, base: Base, samples: Sequence[Sample], new: int) -> None:
        self.chat, self.new = base.chat, new
        self.prompts = [base.chat.prompt(sample.prompt) for sample in samples]
        longest = max(map(len, self.prompts), default=1)
        self.generator = Generator(base.net, max(1, min(16, len(samples))), longest + new)

    def __call__(self) -> list[str]:
        """The answers now, each the most likely one."""
        return [self.chat.decode(ids) for ids in self.generator(self.prompts, self.new, self.chat.stop)] \
            if self.prompts else []


def open_folder(settings: Settings) -> None:
    """Makes the folder of a run, or clears it."""
    if settings.overwrite:
        clear(settings.out)
    settings.out.mkdir(parents=True, exist_ok=True)
    save_settings(settings)


def finetune(settings: Settings, base: Base, ranks: Ranks | None = None) -> tuple[dict[str, float], list[Answered]]:
    """Adapts the base in place, trains the adapter, and writes all that a run leaves into its folder.

    Returns:
        What was measured, by the name it has in results.json, and held-out prompts with their answers.

    Raises:
        UserError: The settings, the data and the base do not fit each other, or the loss is not finite.
        Stopped: A signal came; a checkpoint was saved.
        OSError: The folder cannot be written, or the disk is full.
    """
    ranks, started = ranks or Ranks(), time.monotonic()
    check(settings)
    _, buckets = read_data(settings.data, base, settings, settings.batch_size, ranks)
    file = settings.heldout_file()
    unseen, unseen_buckets = read_data(file, base, settings, 0, ranks) if file else ([], [])
    report = adapt(base.net, settings, buckets)
    say(ranks, str(report))
    # With a part of every layer each process sees all of the data, and all save the adapter together.
    share = Ranks() if settings.parallel == "tensor" else ranks
    saves = ranks.is_first or settings.parallel == "tensor"
    epoch = Batches(buckets, settings.batch_size, 1, 1, settings.seed, share.rank, share.size).sampler.epoch
    steps = settings.steps or max(1, round(settings.epochs * epoch))
    batches = Batches(buckets, settings.batch_size, settings.gradient_accumulation, steps, settings.seed, share.rank,
                      share.size)
    step, rates = make_step(base.net, settings, steps)
    if ranks.is_first:
        open_folder(settings)
    if saves and not settings.resume:
        # What cannot be saved shows now and not at the end.
        save_adapter(base.net, settings.out / "adapter")
    fixed = {name: value for name, value in lasting(settings).items() if name not in MAY_CHANGE}
    state = None if settings.parallel == "tensor" else TrainingState(
        settings.out / CHECKPOINTS, base.net, step, batches.sampler, settings.keep, fixed)
    measured: dict[str, float] = {"trainable": report.trainable, "parameters": report.total, "steps": steps}
    asked = [sample for sample in unseen if len(base.chat.prompt(sample.prompt)) + settings.answer_length
             <= base.net.sizes.context][:settings.answers]
    answering, evaluation = Answering(base, asked, settings.answer_length), Evaluation(
        base.net, unseen_buckets, settings.batch_size)
    base.net.set_train(False)
    before = answering()
    if unseen_buckets:
        measured["heldout_loss_before"] = evaluation()
    if state is not None and settings.resume:
        with explained("--resume", ValueError):
            say(ranks, f"going on after step {state.resume()}")
    losses = train(Run(settings, base.net, ranks, share, batches, step, state, rates))
    answers = [Answered(sample.prompt[-1]["content"], sample.answer, *both)
               for sample, *both in zip(asked, before, answering())]
    if unseen_buckets:
        measured["heldout_loss_after"] = evaluation()
        first, last = measured["heldout_loss_before"], measured["heldout_loss_after"]
        say(ranks, f"held-out loss: {first:.4f} before, {last:.4f} after ({100 * (last / first - 1):+.1f}%)")
    if saves:
        adapter = save_adapter(base.net, settings.out / "adapter")
    if ranks.is_first:
        measured |= {"adapter_bytes": sum(one.stat().st_size for one in adapter.rglob("*.safetensors")),
                     "seconds": time.monotonic() - started}
        save_curve(losses, settings.out / "loss.png")
        save_results(settings, measured, answers)
    return measured, answers


def whole_run(settings: Settings) -> None:
    """Loads the base, tunes it, and says where the results are."""
    use_device(settings)
    ranks = processes.join(settings)
    measured, _ = finetune(settings, load_base(settings.base, max(2048, settings.max_length)), ranks)
    if not ranks.is_first:
        return
    print(f"written to {settings.out}: adapter/ ({measured['adapter_bytes']:,} bytes), report.html, log.jsonl, "
          f"settings.yaml, results.json, answers.json, loss.png")


def use_device(settings: Settings) -> None:
    """Chooses device and mode, and seeds MindSpore.

    Raises:
        UserError: There is no such device.
    """
    with explained(f"MindSpore finds no {settings.device} on this machine", RuntimeError, ValueError):
        # MindSpore refuses to be told again once an operator ran, even the device it is on.
        if ms.get_context("device_target") != settings.device:
            ms.set_device(settings.device)
    ms.set_context(mode=ms.GRAPH_MODE if settings.mode == "graph" else ms.PYNATIVE_MODE)
    ms.set_seed(settings.seed + 1)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(__doc__)
    add_flags(parser)
    arguments = parser.parse_args(argv)
    return run_script("finetune.py", lambda: whole_run(read(arguments)))


if __name__ == "__main__":
    sys.exit(main())
