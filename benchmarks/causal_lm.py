"""The decoder of examples/causal_lm beside PEFT and transformers on torch (sdpa, eager): a step, memory, answers.

    python benchmarks/causal_lm.py --torch /path/to/python          # the Python with torch, transformers and PEFT
    python benchmarks/causal_lm.py --layers 4 --rounds 5            # this package alone, fewer layers

SmolLM2-135M's sizes, random weights, LoRA of rank 8 on q, k, v and o. A step is 4 x 128 tokens, each with its loss.
Each subject has a process of its own, and they take turns. What is compared is the time of one round, the median over
all rounds, and the largest resident size over what the process has when its libraries are loaded.
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
         "vocab_size": 49152, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
         "tie_word_embeddings": True}
BATCH, LENGTH, RANK, PROMPT, NEW = 4, 128, 8, 32, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
Work = Callable[[], None]


def ids_of(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (batch, length)).astype(np.int32)


def decoder(layers: int):
    """Our net with random weights."""
    import mindspore as ms
    from decoder import Decoder, Sizes

    net, rng = Decoder(Sizes(num_hidden_layers=layers, **SIZES)), np.random.default_rng(0)
    for parameter in net.get_parameters():
        if parameter.ndim > 1:
            parameter.set_data(ms.Tensor(0.02 * rng.standard_normal(parameter.shape, dtype=np.float32)))
    return net


def ours(layers: int, what: str) -> Work:
    """A round of this package: a step of LoRA, one of the floor, or an answer."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "causal_lm"))
    import mindspore as ms
    from decoder import AnswerLoss
    from generation import Generator
    from mindspore import nn

    from mindpet_lite import GradientAccumulation, LoraConfig, freeze_delta, freeze_modules, get_pet_model

    ms.set_context(mode=ms.GRAPH_MODE)
    net = decoder(layers)
    if what == "answer":
        generator, prompt = Generator(net, 1, PROMPT + NEW), list(ids_of(1, PROMPT)[0])
        return lambda: generator([prompt], NEW) and None
    if what == "step":
        get_pet_model(net, LoraConfig(lora_rank=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
        freeze_delta(net, "lora")
    else:
        # What any tuning of a frozen base must pay: backward to the bottom, one weight trainable there.
        freeze_modules(net, include=["*"], exclude=["model.layers.0.input_layernorm.weight"])
    net.set_train(True)
    ids = ids_of(BATCH, LENGTH)
    places = np.flatnonzero(np.arange(BATCH * LENGTH) % LENGTH != LENGTH - 1).astype(np.int32)
    inputs = [ms.Tensor(value) for value in (ids, places, ids.reshape(-1)[places + 1],
                                             np.ones((len(places), 1), np.float32), np.float32(len(places)))]
    step = GradientAccumulation(AnswerLoss(net), nn.AdamWeightDecay(net.trainable_params(), 1e-4), 1)
    return lambda: step(*inputs).asnumpy() and None


def theirs(layers: int, what: str) -> Work:
    """A round of transformers and PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sizes = {name: value for name, value in SIZES.items() if name != "rope_theta"}
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=2048, attn_implementation="sdpa",
                         rope_parameters={"rope_type": "default", "rope_theta": SIZES["rope_theta"]}, **sizes)
    model = LlamaForCausalLM(config)
    if what == "answer":
        prompt = torch.tensor(ids_of(1, PROMPT)).long()
        model.eval()
        return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                      max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0) is None
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
    ids = torch.tensor(ids_of(BATCH, LENGTH)).long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0,
                                  fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return step


def serve(side: str, layers: int, what: str) -> None:
    """Does a round for each line that comes; answers with its seconds, those of all threads, and the peak so far."""
    answers, sys.stdout = sys.stdout, sys.stderr
    if side == "ours":
        import mindspore  # noqa: F401

        import mindpet_lite.graph  # noqa: F401
    else:
        import torch  # noqa: F401
    from fresh import Peak

    peak = Peak()
    work = (ours if side == "ours" else theirs)(layers, what)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        work()
        print(time.perf_counter() - start, time.process_time() - used, peak.most(), file=answers, flush=True)


class Subject:
    """A process that does rounds when it is asked to."""

    def __init__(self, python: str, side: str, layers: int, what: str) -> None:
        self.seconds: list[float] = []
        self.used: list[float] = []
        self.bytes = 0
        self.process = subprocess.Popen([python, str(Path(__file__).resolve()), "--serve", side, what, "--layers",
                                         str(layers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self, counts: bool) -> None:
        """Does one."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        seconds, used, most = self.process.stdout.readline().split()
        self.bytes = int(most)
        if counts:
            self.seconds.append(float(seconds))
            self.used.append(float(used))

    def end(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(pairs: dict[str, tuple[str, str, str]], layers: int, rounds: int) -> dict[str, Subject]:
    """Rounds of all subjects in turn; the first of each, which compiles, is not counted."""
    subjects = {name: Subject(python, side, layers, what) for name, (python, side, what) in pairs.items()}
    for number in range(rounds + 1):
        for subject in subjects.values():
            subject.round(number > 0)
    for name, subject in subjects.items():
        middle, least = (1000 * value(subject.seconds) for value in (statistics.median, min))
        print(f"{name:14} {middle:9.1f} ms (least {least:.1f}, of all threads {1000 * min(subject.used):.1f}), "
              f"peak {subject.bytes / 2 ** 30:.2f} GiB", flush=True)
        subject.end()
    return subjects


def ratio(one: Subject, other: Subject) -> float:
    """The median of the ratios of rounds that stood beside each other."""
    return statistics.median(a / b for a, b in zip(one.seconds, other.seconds))


def main() -> None:
    from run import row

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="the Python with torch, transformers and PEFT")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], args.layers, args.serve[1])
        return
    us, them = (sys.executable, "ours"), (args.torch, "theirs")
    steps = {"LoRA": (*us, "step"), "floor": (*us, "floor")} | ({"PEFT": (*them, "step")} if args.torch else {})
    found = compare(steps, args.layers, args.rounds)
    row("causal_lm, LoRA step / floor", f"{ratio(found['LoRA'], found['floor']):.3f}", "", "1.03")
    answers = {"answer": (*us, "answer")} | ({"transformers": (*them, "answer")} if args.torch else {})
    spoken = compare(answers, args.layers, args.rounds)
    row("causal_lm, tokens a second", f"{NEW / statistics.median(spoken['answer'].seconds):.1f}")
    if args.torch:
        row("causal_lm, LoRA step / PEFT's", f"{ratio(found['LoRA'], found['PEFT']):.2f}", "", "1.15")
        row("causal_lm, peak memory / PEFT's", f"{found['LoRA'].bytes / found['PEFT'].bytes:.2f}", "", "1.5")
        row("causal_lm, tokens a second / transformers'", f"{ratio(spoken['transformers'], spoken['answer']):.2f}", "",
            "at least 1")


if __name__ == "__main__":
    main()
