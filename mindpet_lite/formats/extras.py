"""What stands beside LoRA's tensors in the files of kohya's followers (OneTrainer, LyCORIS, ComfyUI)."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mindpet_lite.arguments import MAX_ALPHA, is_alpha, warn_user
from mindpet_lite.formats.files import as_float

# By the end of a key: what a full difference of a parameter is, which LoRA has no place for. Zeros change nothing.
_DIFFERENCES = {"diff": "a full difference of weights", "diff_b": "a difference of a bias",
                "w_norm": "a difference of a norm's weight", "b_norm": "a difference of a norm's bias"}
# By the start of what stands behind a layer's name: methods and parts that cannot be read here.
_OTHERS = {"lora_mid": "LoCon with a third factor (CP decomposition)", "hada_": "a part that LoHa does not have",
           "lokr_": "a part that LoKr does not have",
           "oft_": "OFT", "boft_": "BOFT", "a1.": "GLoRA", "set_weight": "a whole weight",
           "reshape_weight": "the shape of a weight that was made larger", "diff": "a full difference of weights",
           "lora_A": "PEFT's spelling of a factor", "lora_B": "PEFT's spelling of a factor",
           "w_norm": "a difference of a norm's weight", "b_norm": "a difference of a norm's bias"}
# Of a part that is none of them.
NOTHING = "no tensor of a LoRA layer"
# Embeddings of words in one file with an adapter.
BUNDLED = "bundle_emb."


def without_extras(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors without those that are no part of the adapter.

    Embeddings that OneTrainer bundles with an adapter are left out with a warning. Differences of weights and biases
    that are all zero change nothing.

    Raises:
        ValueError: a difference is not zero. All problems stand in one message.
    """
    found, bundled, problems = {}, [], []
    for key, value in tensors.items():
        last = key.rpartition(".")[2]
        if key.startswith(BUNDLED):
            bundled.append(key)
        elif last not in _DIFFERENCES:
            found[key] = value
        elif np.any(as_float(value)):
            problems.append(f"{key} is {_DIFFERENCES[last]}, which cannot be read here.")
    if problems:
        raise ValueError("\n  ".join(problems))
    if bundled:
        warn_user(f"The file holds embeddings of words beside the adapter, which are not read: "
                  f"{', '.join(bundled[:10])}{f' and {len(bundled) - 10} more' if len(bundled) > 10 else ''}.")
    return found


def kind_of_part(part: str) -> str:
    """Return what the part of a key behind a layer's name is, in a sentence."""
    return next((what for start, what in _OTHERS.items() if part.startswith(start)), NOTHING)


def scaled(path: str, alpha: float, scalar: np.ndarray) -> float:
    """Return the alpha of a layer times LyCORIS' `scalar`, which multiplies the update.

    Raises:
        ValueError: `scalar` is not one positive number.
    """
    scalar = as_float(scalar)
    if scalar.size != 1 or scalar.dtype.kind not in "fiu" or not is_alpha(
            alpha * (value := float(scalar.reshape(())))):
        raise ValueError(f"{path}: LyCORIS' scalar must be one positive number, and alpha times it below "
                         f"{MAX_ALPHA:g}, but it is {scalar!r:.60}: the update cannot be expressed.")
    return alpha * value


def magnitude(path: str, scale: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return DoRA's magnitude in PEFT's shape, (out,) for a Dense, (1, out, 1, ...) for a convolution.

    Args:
        path: of the layer.
        scale: LyCORIS' `dora_scale`.
        up: the layer's factor B.

    Raises:
        ValueError: it is not one number for each output.
    """
    out, ones = up.shape[0] if up.ndim > 1 else 0, [1] * (up.ndim - 2)
    if scale.shape not in ((out,), (out, 1, *ones)):
        raise ValueError(f"{path}: dora_scale of shape {scale.shape} is not one number for each of the {out} outputs; "
                         f"LyCORIS' magnitude along the inputs (wd_on_out=False) cannot be expressed.")
    return scale.reshape(out) if up.ndim == 2 else scale.reshape(1, out, *ones)
