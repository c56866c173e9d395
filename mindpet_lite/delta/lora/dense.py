"""LoRA on `nn.Dense`."""
from __future__ import annotations

from typing import Any

import mindspore
from mindspore import nn

from mindpet_lite.delta.dense import check_dense, dense_refusal
from mindpet_lite.delta.hosts import require_float
from mindpet_lite.delta.hosts.dense import DenseHost
from mindpet_lite.delta.lora.settings import NEWER, LoraSettings
from mindpet_lite.delta.lora.sharded import SplitLowRank
from mindpet_lite.delta.lora.starting import HE_UNIFORM
from mindpet_lite.formats.starts import takes_from_base


class LoRADense(SplitLowRank, DenseHost):
    r"""A Dense layer with a trainable low-rank update beside its frozen weight.

    $$
    y = act(x W^T + b + \frac{\alpha}{r} drop(x) A^T B^T)
    $$

    `weight` (out_channels, in_channels) and `bias` (out_channels,) are where nn.Dense has them. The layer adds
    `mindpet_delta_lora_a` (lora_rank, in_channels) and `mindpet_delta_lora_b` (out_channels, lora_rank), and
    `scaling` (), a Parameter that is never trained: it holds strength · alpha / r, so that it can change in a
    compiled graph (`mindpet_lite.set_lora_scale`, `mindpet_lite.adapters_disabled`).

    Dtype rule: parameters keep their type. `to_float(t)` on the layer, or on a net around it, means what it means in
    MindSpore: the input counts as one of type t, and the output has type t. Without it the output has the type of the
    input. In between the layer computes in `compute_dtype` if given, else in t, else in the type of `weight`; what
    differs from it is cast on the way. (MindPet computes in float16 unless told otherwise; this is the one deliberate
    difference.)

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685, eq. 3 and section 4.1.

    Args:
        in_channels (int): size of the last axis of the input; positive.
        out_channels (int): size of the last axis of the output; positive.
        lora_rank (int): rows of A, columns of B; positive. Above min(in, out) a warning says that it is wasted.
        lora_alpha (int | float): finite and positive; the update is scaled by lora_alpha / lora_rank.
        lora_dropout (int | float): probability in [0, 1) of dropping an input of A in training. At 0 there is no
            dropout operator. Default: 0.0.
        lora_a_init (Tensor | str | Initializer | number): start of A. Default: He-uniform with negative slope √5.
        lora_b_init (Tensor | str | Initializer | number): start of B. Default: zeros, so that the layer starts equal
            to its base.
        param_init_type (mindspore.dtype): type of A and B: float16, bfloat16 or float32. Default: float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule. Default: None.
        **dense_kwargs: weight_init, bias_init, has_bias, activation and dtype of nn.Dense; and by keyword, False by
            default, use_rslora (scale by lora_alpha / √lora_rank) and lora_bias (B has a bias of its own): see
            `mindpet_lite.delta.lora.low_rank.LowRank`.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`, any number of leading axes, none included.

    Outputs:
        Tensor `(*, out_channels)`, of the type that the dtype rule says.

    Raises:
        TypeError: lora_rank is a bool or no int; lora_alpha or lora_dropout is a bool or no number; a type is not
            float16, bfloat16 or float32; an initialiser is of no known kind.
        ValueError: lora_rank or lora_alpha is not positive (or alpha, or its scale in a type that it is used in, not
            finite); lora_dropout is outside [0, 1);
            use_dora is set, which needs a base: see `from_dense`; an initial Tensor has the wrong shape; the
            activation's or initialiser's name is unknown.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer = mp.LoRADense(4, 3, lora_rank=2, lora_alpha=4)
        >>> layer(Tensor(np.ones((5, 4), np.float32))).shape
        (5, 3)
        >>> layer.mindpet_delta_lora_a.shape, layer.mindpet_delta_lora_b.shape
        ((2, 4), (3, 2))
    """

    def __init__(self, in_channels: int, out_channels: int, lora_rank: int, lora_alpha: float,
                 lora_dropout: float = 0.0, lora_a_init: Any = HE_UNIFORM, lora_b_init: Any = "zeros",
                 param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None, **dense_kwargs: Any) -> None:
        # The signature is MindPet's; what LoRA gained since is by keyword.
        newer = {name: dense_kwargs.pop(name) for name in NEWER if name in dense_kwargs}
        if newer.get("use_dora"):
            raise ValueError("DoRA starts from the norms of the base's weight, which a new layer does not have yet: "
                             "load the base into an nn.Dense, then use LoRADense.from_dense() or get_pet_model().")
        if "init_lora_weights" in dense_kwargs:
            raise ValueError("init_lora_weights is a setting of LoraConfig: load the base into an nn.Dense, then use "
                             "get_pet_model(). By hand, lora_a_init and lora_b_init say how A and B start.")
        settings = LoraSettings(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init, param_init_type,
                                compute_dtype, **newer)
        super().__init__(**check_dense({"in_channels": in_channels, "out_channels": out_channels, **dense_kwargs}))
        require_float(self.weight, type(self))
        self._add_delta(settings)

    @classmethod
    def from_dense(cls, dense: nn.Dense, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0,
                   lora_a_init: Any = HE_UNIFORM, lora_b_init: Any = "zeros",
                   param_init_type: mindspore.dtype = mindspore.float32,
                   compute_dtype: mindspore.dtype | None = None, **newer: bool) -> LoRADense:
        """Adapt an existing Dense: same Parameter objects and names, same primitives, same activation.

        `dense` itself stays as it is; put the returned layer in its place. With the default `lora_b_init` the output
        is that of `dense`, bit for bit. (In float16 graphs the CPU backend leaves out roundings between operators of
        the plain layer, so there the last bit can differ.) The arguments are those of the class, and use_dora.

        Raises:
            TypeError: `dense` is no nn.Dense, is adapted already, or overrides `construct`.
            ValueError: as the class.
        """
        reason = dense_refusal(dense, "LoRA")
        if reason:
            raise TypeError(reason)
        if takes_from_base(newer.get("init_lora_weights")):
            raise ValueError(f"init_lora_weights {newer['init_lora_weights']!r} takes a part out of the weight of "
                             f"`dense`, which from_dense() leaves as it is: use get_pet_model().")
        layer = cls._on(dense, LoraSettings(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init,
                                            param_init_type, compute_dtype, **newer))
        layer.watch_start()
        return layer
