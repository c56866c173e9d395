"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning.

Qiu et al., 2023, https://arxiv.org/abs/2306.07280, sections 3 and 4:

    y = W Rᵀ x + b    R = diag(R1, ..., Rr)    Ri = (I - Qi) (I + Qi)⁻¹    Qi = -Qiᵀ    (equation 3)

W is turned, so the angles between the weights of its outputs stay. Q starts at zero, so training starts at the base.
With strength t the matrix is I + t (R - I). COFT (equation 2) is here as in PEFT: it bounds ||Qi||, not ||Ri - I||.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.arguments import check_bool, check_int, check_positive, check_probability, did_you_mean
from mindpet_lite.delta.adapted import Method, Numbers
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import as_type, put
from mindpet_lite.delta.rotation import Rotated, cayley_numbers, turned_weight
from mindpet_lite.formats.peft_method import PeftMethod

_R, _TABLE = "mindpet_delta_oft_r", "mindpet_delta_oft_embedding_r"
BIASES = ("none", "all", "oft_only")


class OFT(Rotated):
    """A layer whose weight is turned by blocks.

    `mindpet_delta_oft_r` (blocks, n(n-1)/2) holds the upper triangles of Q by rows; (1, n(n-1)/2) with `block_share`;
    of a table `mindpet_delta_oft_embedding_r`. `scaling` () is the strength. The rule for types is that of
    `mindpet_lite.LoRADense`; R is computed in float32.
    """

    method = "oft"

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of the triangles.

        Raises:
            ValueError: the blocks would have one row, which nothing turns; or see `width`.
        """
        width = cls.width(layer)
        size = width // nearest_divisor(width, config.r) if config.r else nearest_divisor(width, config.oft_block_size)
        if size == 1:
            asked = f"r={config.r}" if config.r else f"oft_block_size={config.oft_block_size}"
            raise ValueError(f"its inputs are {width}, which {asked} cuts into blocks of 1, where nothing can turn; "
                             f"choose blocks of 2 or more, or leave it out with exclude_modules.")
        return {_TABLE if cls.takes_ids else _R: (1 if config.block_share else width // size, size * (size - 1) // 2)}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return zeros, or with ``init_weights=False`` numbers from a normal distribution of deviation 0.1."""
        ((name, shape),) = self.shapes(self, config).items()
        return {name: np.zeros(shape) if config.init_weights else np.random.normal(0.0, 0.1, shape)}

    def prepare(self, config: Any) -> None:
        """Make operators, and the places in a triangle of a block's numbers."""
        blocks, numbers = getattr(self, self.delta_names[0]).shape
        size = _size_of(numbers)
        self.add_rotation(blocks, size, 1, config.module_dropout)
        self.shape = (blocks, size, size)
        places, signs = skew_places(size)
        self.places, self.signs = Tensor(places.astype(np.int32)), Tensor(signs.astype(np.float32))
        self.coft, self.terms = config.coft, config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        self.radius = config.eps / math.sqrt(blocks)

    def differences(self) -> Tensor:
        """Return R - I by blocks."""
        triangle = as_type(getattr(self, self.delta_names[0]), mindspore.float32)
        if self.coft:
            triangle = self._inside(triangle)
        skew = ops.reshape(ops.gather(triangle, self.places, 1) * self.signs, self.shape)
        if self.terms:
            return neumann(skew, self.terms, self.product)
        return self.cayley(skew)

    def _inside(self, triangle: Tensor) -> Tensor:
        """Return the triangles, those of too large a norm projected, with the gradient of what is not projected.

        That is the gradient that PEFT takes: at the projected triangles, and of them.
        """
        norm = ops.sqrt(2 * ops.square(triangle).sum(1, keepdims=True))
        projected = ops.stop_gradient(triangle * (self.radius / ops.maximum(norm, self.radius)))
        # What is added is zero, exactly, with the gradient of the triangles.
        return projected + (triangle - ops.stop_gradient(triangle))

    def project(self) -> None:
        """Write the projected triangles into the Parameter: with `coft`, called between steps, PEFT's training.

        PEFT's forward does that by itself. What the layer computes stays the same, but for a rounding.
        """
        if self.coft:
            parameter = getattr(self, self.delta_names[0])
            values = inside(parameter.astype(mindspore.float32).asnumpy(), self.config.eps)
            put(parameter, Tensor(values).astype(parameter.dtype))

    @staticmethod
    def merged(base: Numbers, tensors: Numbers, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return W Rᵀ, of a table W R."""
        is_table = _TABLE in tensors
        triangle = tensors[_TABLE if is_table else _R]
        blocks, numbers = triangle.shape
        size = _size_of(numbers)
        if settings["coft"]:
            triangle = inside(triangle, settings["eps"])
        places, signs = skew_places(size)
        skew = (triangle[:, places] * signs.astype(triangle.dtype)).reshape(blocks, size, size)
        if settings["use_cayley_neumann"]:
            change = neumann(skew, settings["num_cayley_neumann_terms"], np.matmul)
        else:
            change = cayley_numbers(skew)
        return {"weight": turned_weight(base["weight"], (change,), is_table)}


def inside(triangle: np.ndarray, eps: float) -> np.ndarray:
    """Return the triangles with ||Q|| of each block at or below eps / √blocks."""
    radius = eps / math.sqrt(len(triangle))
    norm = np.sqrt(2 * np.square(triangle).sum(1, keepdims=True))
    found: np.ndarray = triangle * (radius / np.maximum(norm, radius)).astype(triangle.dtype)
    return found


def neumann(skew: Any, terms: int, product: Any) -> Any:
    """Return 2 Q + 2 Q² + ... + Qᵏ, of Tensors or of numpy's arrays: the series of (I + Q) (I - Q)⁻¹ - I, cut off.

    As PEFT: the last power is k = terms - 1, but at least 3, with factor 1; of 2 terms it is 2 Q alone. The sign of Q
    is not that of the exact R.
    """
    if terms == 2:
        return skew * 2.0
    found = skew
    for _ in range(max(terms - 1, 3) - 1):
        found = skew * 2.0 + product(skew, found)
    return found


def skew_places(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each number of a skew-symmetric matrix, by rows, its place in the upper triangle, and its sign."""
    places, signs = np.zeros((size, size), np.int64), np.zeros((size, size))
    rows, columns = np.triu_indices(size, 1)
    places[rows, columns] = places[columns, rows] = np.arange(rows.size)
    signs[rows, columns], signs[columns, rows] = 1, -1
    return places.reshape(-1), signs.reshape(-1)


def _size_of(numbers: int) -> int:
    """Return the size of a block whose triangle has so many numbers."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def nearest_divisor(width: int, wanted: int) -> int:
    """Return the divisor of `width` that is nearest to `wanted`, of two the smaller, as PEFT does."""
    return min((item for item in range(1, width + 1) if width % item == 0), key=lambda item: (abs(item - wanted), item))


class _File(PeftMethod):
    """PEFT before 0.18 computed the series otherwise, and its exact form was the default."""

    def problems_of(self, config: Mapping[str, Any]) -> list[str]:
        """Return, a sentence each, why an adapter with this config cannot be used."""
        problems = super().problems_of(config)
        written = str(config.get("peft_version") or "0")
        digits = [int("".join(filter(str.isdigit, item)) or 0) for item in written.partition("@")[0].split(".")[:2]]
        if config.get("use_cayley_neumann", True) and tuple(digits) < (0, 18):
            problems.append(f"use_cayley_neumann is {config.get('use_cayley_neumann', 'not said')}, and peft_version "
                            f"{config.get('peft_version', 'not said')}: PEFT before 0.18 computed that otherwise. If "
                            f"you know that the adapter is of PEFT 0.18 or later, write peft_version into its config; "
                            f"where it is older and was trained without, write \"use_cayley_neumann\": false.")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFTConfig(MethodConfig):
    """Settings of OFT; the names and defaults are PEFT's.

    Of `r` and `oft_block_size` one must be 0. Where the other does not divide a layer's inputs, the nearest number that
    does is taken, as PEFT does; a convolution's inputs are those of a kernel, channels times places.

    Args:
        r: number of blocks, positive; 0: oft_block_size says it. Default: 0.
        oft_block_size: size of a block, positive; 0: r says it. Default: 32.
        module_dropout: probability in [0, 1) with which a block is I in a call in training. (PEFT 0.21 has the field
            and does not use it.) Default: 0.0.
        bias: which biases of the base train too: "none", "all", or "oft_only", those of the adapted layers.
            Default: "none".
        init_weights: True starts at the base; False at random. Default: True.
        coft: keep ||Q|| of each block at or below eps / √blocks: a larger Q is scaled down before it is used. (PEFT's
            forward also writes that into the parameter. Here `project()` of the layer does, for a training that is the
            same step by step: a compiled forward changes no Parameter.) Default: False.
        eps: see `coft`; a finite number above 0. Default: 6e-5.
        block_share: True: one block is used for all. Default: False.
        use_cayley_neumann: a series instead of the exact R: fast, but R is orthogonal only about where Q is small.
            Default: True.
        num_cayley_neumann_terms: of that series, 2 or more; 3 is the same as 4, as in PEFT. Default: 5.

    Raises:
        TypeError, ValueError: a value is none of these.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(8, 4), nn.ReLU(), nn.Dense(4, 2))
        >>> net = mp.get_pet_model(net, mp.OFTConfig(target_modules=["0"], oft_block_size=4))
        >>> sum(item.size for item in net.trainable_params())
        12
    """

    pet_type: ClassVar[str] = "oft"
    layer: ClassVar[type[Method]] = OFT
    title: ClassVar[str] = "OFT"
    peft: ClassVar[PeftMethod] = _File(
        "OFT", {_R: "oft_R.weight", _TABLE: "oft_embedding_R.weight"},
        {"r": 0, "oft_block_size": 32, "module_dropout": 0.0, "coft": False, "eps": 6e-5, "block_share": False,
         "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
        neutral={"bias": ("none",)},
        written={"bias": "none", "fan_in_fan_out": False, "init_weights": True, "peft_version": "0.21.2"})

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "oft_block_size"):
            check_int(name, getattr(self, name), 0)
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(f"give r or oft_block_size, and 0 for the other, because their product is the number of a "
                             f"layer's inputs; but got r={self.r} and oft_block_size={self.oft_block_size}.")
        check_probability("module_dropout", self.module_dropout)
        check_positive("eps", self.eps)
        check_int("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 2)
        for name in ("init_weights", "coft", "block_share", "use_cayley_neumann"):
            check_bool(name, getattr(self, name))
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, but got {self.bias!r:.100}."
                             f"{did_you_mean(str(self.bias), BIASES)}")

    def trains_base(self, name: str, of_adapted_layer: bool) -> bool:
        """Tell whether a base Parameter is a bias that `bias` says to train."""
        return name.endswith("bias") and (self.bias == "all" or self.bias == "oft_only" and of_adapted_layer)
