"""The methods of the comparison: how each is put into the classifier, and the learning rate that it was given.

Every method of mindpet_lite is here or in `LEFT_OUT`; a test holds that.
"""

import difflib
from dataclasses import dataclass, field
from typing import Any

from classifier import HEAD
from user_errors import UserError, sentence

from mindpet_lite.delta import METHODS
from mindpet_lite.delta.delta_config import DeltaConfig

QUERY_VALUE = "query|value"
# The last layer of both parts of a BERT layer: behind them the adapters of Houlsby et al. stand.
SUBLAYERS = r".*layer\.\d+\.(attention\.)?output\.dense"
FEEDFORWARD = r".*layer\.\d+\.output\.dense"


@dataclass(frozen=True)
class Choice:
    """A way to train.

    Attributes:
        title: Its name in the table.
        rate: The highest learning rate.
        pet_type: mindpet_lite's name of the method; None for what has no adapter.
        targets: The layers, as `target_modules`; None lets the method find them.
        fields: Other fields of the config.
        rank: The field that says how large it is, which ``--lora-rank`` sets.
    """

    title: str
    rate: float
    pet_type: str | None = None
    targets: str | None = QUERY_VALUE
    fields: dict[str, Any] = field(default_factory=dict)
    rank: str | None = None


def lora(title: str, rate: float, **fields: Any) -> Choice:
    """A kind of LoRA of rank 8."""
    return Choice(title, rate, "lora", QUERY_VALUE, {"lora_rank": 8, "lora_alpha": 16, **fields}, "lora_rank")


CHOICES: dict[str, Choice] = {
    "frozen": Choice("frozen, linear head", 0.0),
    "full": Choice("full fine-tuning", 5e-5),
    "lora": lora("LoRA", 6e-4),
    "dora": lora("DoRA", 6e-4, use_dora=True),
    "rslora": lora("rsLoRA", 2e-4, use_rslora=True),
    "pissa": lora("PiSSA", 3e-4, init_lora_weights="pissa"),
    "adalora": Choice("AdaLoRA", 3e-3, "adalora", fields={"init_r": 12, "target_r": 8, "lora_alpha": 32},
                      rank="init_r"),
    "vera": Choice("VeRA", 1e-2, "vera", fields={"r": 256, "save_projection": False}, rank="r"),
    "loha": Choice("LoHa", 1e-3, "loha", fields={"r": 8, "alpha": 16}, rank="r"),
    "lokr": Choice("LoKr", 1e-3, "lokr", fields={"r": 8, "alpha": 16}, rank="r"),
    "hira": Choice("HiRA", 3e-3, "hira", fields={"r": 8}, rank="r"),
    "hra": Choice("HRA", 3e-3, "hra", fields={"r": 8}, rank="r"),
    "oft": Choice("OFT", 1e-3, "oft", fields={"oft_block_size": 32}, rank="oft_block_size"),
    "boft": Choice("BOFT", 1e-3, "boft", fields={"boft_block_size": 8, "boft_n_butterfly_factor": 2},
                   rank="boft_block_size"),
    "ia3": Choice("(IA)³", 5e-3, "ia3", rf".*\.self\.(key|value)|{FEEDFORWARD}", {"feedforward_modules": FEEDFORWARD}),
    "ln_tuning": Choice("LN tuning", 3e-3, "ln_tuning", None),
    "bitfit": Choice("BitFit", 1e-3, "bitfit", r".*\.(query|key|value|dense)"),
    "adapter": Choice("Adapter", 1e-3, "adapter", SUBLAYERS, {"bottleneck_size": 16}, "bottleneck_size"),
    "low_rank_adapter": Choice("Low-rank adapter", 3e-3, "low_rank_adapter", SUBLAYERS,
                               {"reduction_factor": 16, "low_rank_size": 1}, "low_rank_size"),
    "prefixtuning": Choice("Prefix-Tuning", 1e-3, "prefixtuning", "key|value",
                           {"prefix_token_num": 8, "embed_dim": 32, "mid_dim": 32, "dropout_rate": 0.0},
                           "prefix_token_num"),
    "ptuning2": Choice("P-Tuning v2", 5e-3, "ptuning2", "key|value", {"pre_seq_len": 8, "dropout_prob": 0.0},
                       "pre_seq_len"),
    "prompt_tuning": Choice("Prompt tuning", 3e-2, "prompt_tuning", None,
                            {"num_virtual_tokens": 8, "prompt_tuning_init": "SAMPLE_VOCAB"}, "num_virtual_tokens"),
    "p_tuning": Choice("P-tuning", 1e-3, "p_tuning", None, {"num_virtual_tokens": 8}, "num_virtual_tokens"),
}
LEFT_OUT = {
    "trainable_tokens": "it trains rows of new or changed words, and a review has none",
    "multitask_prompt_tuning": "it shares a prompt among tasks, and here is one; alone it is prompt tuning",
}


def choice_of(name: str) -> Choice:
    """The way to train of this name.

    Raises:
        UserError: There is none.
    """
    if name in LEFT_OUT:
        raise UserError(f"{name} does not fit this example: {LEFT_OUT[name]}; the methods are {', '.join(CHOICES)}")
    if name not in CHOICES:
        near = difflib.get_close_matches(name, CHOICES, 1)
        raise UserError(f"unknown method {name!r}{f', did you mean {near[0]}?' if near else ':'} the methods are "
                        f"{', '.join(CHOICES)}")
    return CHOICES[name]


def config_of(name: str, targets: str | None, rank: int | None, fields: dict[str, Any], steps: int
              ) -> DeltaConfig | None:
    """The config of a method; the head trains and is saved with it.

    Args:
        name: Of the method.
        targets: Other layers than the method's own choice.
        rank: Another size.
        fields: Other fields.
        steps: Of the training, which AdaLoRA's schedule needs.

    Returns:
        The config, or None where no adapter is made.

    Raises:
        UserError: A value is none for the method.
    """
    choice = choice_of(name)
    if choice.pet_type is None:
        given = [flag for flag, value in (("--targets", targets), ("--lora-rank", rank), ("--set", fields)) if value]
        if given:
            raise UserError(f"{given[0]} is of adapters, and the method {name} has none: leave it out")
        return None
    values: dict[str, Any] = {**choice.fields, "modules_to_save": [HEAD]}
    if targets or choice.targets:
        values["target_modules"] = targets or choice.targets
    if choice.pet_type == "adalora":
        values |= {"total_step": steps, "tinit": steps // 5, "tfinal": 3 * steps // 10}
    if rank is not None:
        if choice.rank is None:
            raise UserError(f"the method {name} has no rank: leave --lora-rank out")
        values[choice.rank] = rank
    try:
        return METHODS[choice.pet_type](**{**values, **fields})
    except (TypeError, ValueError) as error:
        raise UserError(f"the method {name} cannot be set so: {sentence(error)}") from error
