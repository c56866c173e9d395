"""The memory of a training step, before it is run and without its weights."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mindpet_lite.estimate.cpu_operators import CpuOperators
from mindpet_lite.estimate.kernels import Kernel, as_run, highest
from mindpet_lite.estimate.layers import Lora
from mindpet_lite.estimate.tape import Value

# Bytes of an element of weights and activations.
ITEMS = {"float32": 4, "float16": 2, "bfloat16": 2}
# How many numbers an optimizer keeps for each one that trains, all in float32.
OPTIMIZERS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 2}
# What MindSpore's compiler and runtime hold on CPU in graph mode, by `benchmarks/estimate.py --constants`: a part of
# its own, and one for each kernel, less for those that the compiler copies to recompute.
START, PER_KERNEL, PER_COPY = 60_000_000, 240_000, 110_000


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of a training step.

    Attributes:
        weights: of the model, frozen or not.
        deltas: of LoRA; none in full fine-tuning.
        gradients: of what trains.
        optimizer: its state.
        activations: the most that forward and backward hold at a time, beside the gradients.
        tables: indices that MindSpore's kernels keep on CPU in graph mode, and nowhere else.
        compiler: what MindSpore's compiler and runtime hold on CPU in graph mode.
    """

    weights: int
    deltas: int
    gradients: int
    optimizer: int
    activations: int
    tables: int
    compiler: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.deltas + self.gradients + self.optimizer + self.activations

    @property
    def process(self) -> int:
        """Bytes of a process on CPU, over those of the imported framework."""
        return self.device + self.tables + self.compiler


def plan(forward: Callable[[CpuOperators], Value], lora: Mapping[str, Lora] | None, dtype: str = "float32",
         optimizer: str = "adamw", quantised: str = "") -> Plan:
    """Return the plan of a step with LoRA, or of full fine-tuning.

    Args:
        forward: records the forward pass and returns the loss.
        lora: by the paths of the layers that have it; None for full fine-tuning.
        dtype: of weights and activations, a key of `ITEMS`; what trains is float32.
        optimizer: a key of `OPTIMIZERS`.
        quantised: with LoRA, how the weights of dense layers are held: a kind of `quantize_base`, or empty.
    """
    tape = CpuOperators(ITEMS[dtype], (lambda path: lora is None or ".mindpet_delta_lora_" in path),
                        lora or {}, quantised if lora is not None else "")
    kernels = tape.backward(forward(tape))
    trained = tape.bytes_of(True)
    # The optimizer comes last, so all gradients are there in the end, each as large as what it is of.
    gradients = [piece for kernel in kernels if not kernel.writes for piece in kernel.reads]
    activations = max(0, highest(as_run(kernels), gradients) - trained)
    weights, deltas = (trained, 0) if lora is None else (tape.bytes_of(False), trained)
    return Plan(weights, deltas, trained, OPTIMIZERS[optimizer] * trained, activations,
                sum(kernel.tables for kernel in kernels), compiled(kernels))


def compiled(kernels: Sequence[Kernel]) -> int:
    """Return the bytes that the compiled graph of these kernels takes on CPU."""
    return START + sum(PER_COPY if kernel.copied else PER_KERNEL for kernel in kernels)
