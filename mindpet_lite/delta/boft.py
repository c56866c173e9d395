"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization.

Liu et al., 2023, https://arxiv.org/abs/2311.06243, section 4:

    y = s · W Rᵀ x + b    R = M(m) ... M(1)    M(i) = P(i) diag(Ri1, ..., Rik) P(i)ᵀ    Rij = (I - Q) (I + Q)⁻¹

Q = (A - Aᵀ) / 2 for a trained A of each block. P(1) is I, so that with m = 1 the blocks are those of OFT; from the
second on P(i) lets the i-th factor mix what the ones before it kept apart, as in the butterflies of a fast Fourier
transform. s, a factor for each output, is PEFT's. A starts at zero and s at one, so training starts at the base.
With strength t each block is I + t (Rij - I) and the factor 1 + t (s - 1).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.arguments import check_bool, check_int, check_probability, did_you_mean
from mindpet_lite.delta.adapted import Method, Numbers
from mindpet_lite.delta.hosts import HOSTS, Host
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import as_type
from mindpet_lite.delta.rotation import Rotated, cayley_numbers, turned_weight
from mindpet_lite.formats.peft_method import PeftMethod

_R, _S = "mindpet_delta_boft_r", "mindpet_delta_boft_s"
BIASES = ("none", "all", "boft_only")


class BOFT(Rotated):
    """A layer whose weight is turned by the factors of a butterfly, and whose outputs are scaled.

    `mindpet_delta_boft_r` (factors, blocks, n, n) holds A, `mindpet_delta_boft_s` (outputs, 1) holds s; (1, outputs)
    for a convolution, as PEFT has it. `scaling` () is the strength. The rule for types is that of
    `mindpet_lite.LoRADense`; R is computed in float32.
    """

    method = "boft"

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and s.

        Raises:
            ValueError: the layer's inputs cannot be cut so; or see `width`.
        """
        width, factors = cls.width(layer), config.boft_n_butterfly_factor
        name = "boft_block_num" if config.boft_block_num else "boft_block_size"
        given = getattr(config, name)
        if width % given:
            raise ValueError(f"{name} must divide the layer's {width} inputs (of a kernel: channels times places), but "
                             f"got {given}.")
        size = width // given if config.boft_block_num else given
        blocks = width // size
        if factors > 1 and (size % 2 or blocks % 2 ** (factors - 1)):
            raise ValueError(f"boft_n_butterfly_factor {factors} needs blocks of an even size, whose number is a "
                             f"multiple of {2 ** (factors - 1)}, but the layer's {width} inputs are {blocks} blocks of "
                             f"{size} by {name} {given}.")
        outputs = cls.outputs(layer)
        return {_R: (factors, blocks, size, size), _S: (1, outputs) if cls.dims else (outputs, 1)}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return zeros and ones, or with ``init_weights=False`` numbers near them (a deviation of 0.1)."""
        spread = 0.0 if config.init_weights else 0.1
        return {name: np.random.normal(float(name == _S), spread, shape)
                for name, shape in self.shapes(self, config).items()}

    def prepare(self, config: Any) -> None:
        """Make operators and constants."""
        factors, blocks, size, _ = self.mindpet_delta_boft_r.shape
        # PEFT drops blocks of one factor a call, chosen at random: so many on average.
        self.add_rotation(factors * blocks, size, factors, config.boft_dropout / factors)
        self.shape = (factors * blocks, size, size)
        self.factor_shape = self.across(self.mindpet_delta_boft_s.size)
        self.bias_is_there = self.adds_bias()

    def differences(self) -> Tensor:
        """Return the blocks of all factors less I."""
        free = ops.reshape(as_type(self.mindpet_delta_boft_r, mindspore.float32), self.shape)
        return self.cayley((free - ops.transpose(free, (0, 2, 1))) * 0.5)

    def adapted(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the output with inputs or kernels turned, and what the weight makes of them scaled."""
        y = self.rotated(h, again, dtype)
        factor = ops.reshape(as_type(self.mindpet_delta_boft_s, mindspore.float32), self.factor_shape)
        # Where s is one, nothing is added, exactly.
        change = as_type((factor - 1) * self.scaling, dtype)
        if self.bias_is_there:
            return y + (y - ops.reshape(as_type(self.bias, dtype), self.factor_shape)) * change
        return y + y * change

    @classmethod
    def merged(cls, base: Numbers, tensors: Numbers, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return s · W Rᵀ."""
        return cls.merged_at(base, tensors, settings, 1.0)

    @classmethod
    def merged_at(cls, base: Numbers, tensors: Numbers, settings: Mapping[str, Any], strength: float
                  ) -> dict[str, np.ndarray]:
        """Return s · W Rᵀ for the blocks and the factor at the strength."""
        free, weight = tensors[_R], base["weight"]
        changes = strength * cayley_numbers((free - free.swapaxes(-1, -2)) / 2)
        factor = (1 + strength * (tensors[_S] - 1)).reshape(-1, *[1] * (weight.ndim - 1))
        return {"weight": turned_weight(weight, tuple(changes)) * factor}


class _File(PeftMethod):
    """Without its CUDA kernel PEFT trains one factor whatever the config says: the file's tensor tells how many."""

    def settings_held(self, settings: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the settings with the number of factors that the tensor has."""
        return {**settings, "boft_n_butterfly_factor": len(tensors[_R])} if _R in tensors else settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class BOFTConfig(MethodConfig):
    """Settings of BOFT; the names and defaults are PEFT's.

    Of `boft_block_size` and `boft_block_num` one must be 0. A convolution's inputs are those of a kernel, channels
    times places.

    Args:
        boft_block_size: size of a block, positive; it must divide a layer's inputs. 0: boft_block_num says it. Default:
            4.
        boft_block_num: number of blocks of a factor, positive, likewise. 0: boft_block_size says it. Default: 0.
        boft_n_butterfly_factor: number of factors. From 2 on blocks have an even size, and their number is a multiple
            of 2 ** (factors - 1). (PEFT trains one factor where its CUDA kernel is missing; such files are read as what
            they hold.) Default: 1.
        boft_dropout: probability in [0, 1) with which a block of one factor is I in a call in training; of several
            factors each block is with the probability divided by their number. (PEFT chooses a factor at random, and of
            its blocks this share, rounded down.) Default: 0.0.
        bias: which biases of the base train too: "none", "all", or "boft_only", those of the adapted layers.
            Default: "none".
        init_weights: True starts at the base; False at random. Default: True.

    Raises:
        TypeError, ValueError: a value is none of these.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(8, 4), nn.ReLU(), nn.Dense(4, 2))
        >>> config = mp.BOFTConfig(target_modules=["0"], boft_block_size=2, boft_n_butterfly_factor=2)
        >>> sum(item.size for item in mp.get_pet_model(net, config).trainable_params())
        36
    """

    pet_type: ClassVar[str] = "boft"
    layer: ClassVar[type[Method]] = BOFT
    title: ClassVar[str] = "BOFT"
    fits: ClassVar[tuple[type[Host], ...]] = tuple(host for host in HOSTS if not host.takes_ids)
    peft: ClassVar[PeftMethod] = _File(
        "BOFT", {_R: "boft_R", _S: "boft_s"},
        {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1, "boft_dropout": 0.0},
        neutral={"bias": ("none",)}, written={"bias": "none", "fan_in_fan_out": False, "init_weights": True})

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("boft_block_size", "boft_block_num"):
            check_int(name, getattr(self, name), 0)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ValueError(f"give boft_block_size or boft_block_num, and 0 for the other, because their product is "
                             f"the number of a layer's inputs; but got boft_block_size={self.boft_block_size} and "
                             f"boft_block_num={self.boft_block_num}.")
        check_int("boft_n_butterfly_factor", self.boft_n_butterfly_factor)
        check_probability("boft_dropout", self.boft_dropout)
        check_bool("init_weights", self.init_weights)
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, but got {self.bias!r:.100}."
                             f"{did_you_mean(str(self.bias), BIASES)}")

    def trains_base(self, name: str, of_adapted_layer: bool) -> bool:
        """Tell whether a base Parameter is a bias that `bias` says to train."""
        return name.endswith("bias") and (self.bias == "all" or self.bias == "boft_only" and of_adapted_layer)
