"""Training steps in torch, one at a time as they are asked for, so that they take turns with MindSpore's in one run.

    S="--blocks 4 --width 512 --heads 8 --batch 4 --tokens 128 --rank 8"
    echo "PEFT, eager" | python benchmarks/torch_step.py $S
    python benchmarks/torch_step.py $S --profile "PEFT, eager" --rounds 10

Started by step.py and profile_step.py with the Python that has torch and PEFT. Each line that it reads names a step,
and it answers with the seconds that one took. The first time a step is asked for it is built. With --profile it writes
the milliseconds and calls a step of every operator as JSON.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable

import torch
from torch_models import Loss

# transformers looks for a package "kernels": not the script beside this one, which would bring MindSpore in.
sys.path.pop(0)
from peft import LoraConfig, get_peft_model  # noqa: E402

TARGETS = ["to_q", "to_k", "to_v", "to_out"]


def floor(args: argparse.Namespace) -> torch.nn.Module:
    model = Loss(args.blocks, args.width, args.heads).requires_grad_(False)
    model.net[0].norm1.bias.requires_grad_(True)
    return model


def peft(args: argparse.Namespace) -> torch.nn.Module:
    return get_peft_model(Loss(args.blocks, args.width, args.heads), LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS))


NETS: dict[str, Callable[[argparse.Namespace], torch.nn.Module]] = {
    "torch floor": floor,
    "PEFT, eager": peft,
    "PEFT, compile": lambda args: torch.compile(peft(args)),
}


def build(name: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return a training step: forward, backward, AdamW on what is trainable."""
    torch.manual_seed(1)
    model = NETS[name](args)
    x = torch.randn(args.batch, args.tokens, args.width)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad],
                                  lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()

    return step


def profile(step: Callable[[], None], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the milliseconds that every operator takes itself in one step, and how often it is called."""
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            step()
    return {event.key: (event.self_cpu_time_total / 1000 / rounds, event.count / rounds)
            for event in profiler.key_averages()}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("blocks", "width", "heads", "batch", "tokens", "rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--profile", choices=NETS)
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    step_of = functools.lru_cache(None)(lambda name: build(name, args))
    # What torch and PEFT print is no answer.
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        if args.profile:
            print(json.dumps(profile(step_of(args.profile), args.rounds)), file=answers)
            return
        for line in sys.stdin:
            step = step_of(line.strip())
            start = time.perf_counter()
            step()
            print(time.perf_counter() - start, file=answers, flush=True)


if __name__ == "__main__":
    main()
