"""How PEFT's files hold Prefix-Tuning: the keys and values of all attentions in one tensor, in their order."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats.peft_method import PeftMethod
from mindpet_lite.formats.state import AdapterState

KEY_ROWS, VALUE_ROWS = "mindpet_delta_prefixtuning_key", "mindpet_delta_prefixtuning_value"
PEFT_TYPE, TENSOR = "PREFIX_TUNING", "prompt_embeddings"


class PrefixFile(PeftMethod):
    """PEFT's tensor is (n, layers · 2 · width): of each attention the keys, then the values.

    They are what an attention reads, behind the positions: those of a `PrefixLayer` without an MLP. A `PrefixDense`
    puts its rows before positions are in, and has files of our own. So has every net whose prefixes did not come from
    PEFT.
    """

    def holds(self, state: AdapterState) -> bool:
        """Tell whether the prefixes came from PEFT, and are keys and values still."""
        return state.config.get("peft_type") == PEFT_TYPE and all(
            set(layer.tensors) == {KEY_ROWS, VALUE_ROWS} for layer in state.layers.values())

    def layer_settings(self, path: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a prefix without an MLP: PEFT keeps none."""
        return {"prefix_token_num": config.get("num_virtual_tokens"), "prefix_projection": False}

    def config_fields(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the number of rows."""
        (count,) = {item.get("prefix_token_num") for item in settings.values()}
        return {"num_virtual_tokens": count}

    def tensors_of(self, layers: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the one tensor."""
        return {TENSOR: np.concatenate([layer[name] for layer in layers.values() for name in (KEY_ROWS, VALUE_ROWS)],
                                       1)}

    def layers_of(self, layers: Mapping[str, Mapping[str, np.ndarray]], config: Mapping[str, Any]
                  ) -> dict[str, Mapping[str, np.ndarray]]:
        """Return the keys and values of each attention, under names with their numbers.

        Raises:
            ValueError: the tensor is not of as many attentions as the config says.
        """
        rows, count = layers[self.home][KEY_ROWS], config.get("num_layers")
        if type(count) is not int or count < 1 or rows.ndim != 2 or rows.shape[1] % (2 * count):
            raise ValueError(f"{TENSOR} has the shape {rows.shape}, which is not (rows, num_layers · 2 · width) for "
                             f"num_layers = {count!r:.60} of the config.")
        parts = np.split(rows, 2 * count, 1)
        return {f"{self.home}.{number}": {KEY_ROWS: parts[2 * number], VALUE_ROWS: parts[2 * number + 1]}
                for number in range(count)}


PREFIX_FILE = PrefixFile(
    PEFT_TYPE, {KEY_ROWS: TENSOR}, neutral={"num_transformer_submodules": (1, None)}, home=TENSOR,
    needs="PEFT's prefixes are keys and values behind the rotary positions, which no layer of a net gives. Put a "
          "PrefixLayer with prefix_projection=False into each attention, put its rows before keys and values where the "
          "positions are in already, count the positions of the tokens from the number of rows on, and load the file "
          "into that net.",
    remark="PEFT's files of prefixes hold keys and values, not the MLP that may have given them: what trains on here "
           "is keys and values themselves.")
