"""`import mindpet` finds this package: every documented name, in a process of its own each time."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mindpet_lite
from mindpet_lite.compat import MODULES, is_version_ge, is_version_le

ROOT = Path(mindpet_lite.__file__).parents[1]
DOCUMENTED = """
import mindpet_lite
mindpet_lite.install_as_mindpet()
import mindpet
import mindpet.delta.lora as lora
from mindpet import mindpet_sdk
from mindpet.delta import (AdapterDense, AdapterLayer, LoRADense, LowRankAdapterDense, LowRankAdapterLayer,
                           PrefixEncoder, PrefixLayer, RDropLoss, rdrop_repeat)
from mindpet.delta.adapter import AdapterDense as again, AdapterLayer
from mindpet.delta.delta_constants import VALID_TENSOR_DATATYPE
from mindpet.delta.lora import LoRADense as third
from mindpet.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer, LowRankLinear
from mindpet.delta.prefix_layer import PrefixLayer as prefix
from mindpet.delta.ptuning2 import PrefixEmbedding, PrefixEncoder
from mindpet.delta.r_drop import RDropLoss, rdrop_repeat
from mindpet.graph import TrainableParamsCheckPoint, freeze_delta, freeze_from_config, freeze_modules
from mindpet.graph.ckpt_util import TrainableParamsCheckPoint as callback
from mindpet.graph.freeze_utils import freeze_delta as freeze, freeze_from_config, freeze_modules
from mindpet.layers.activation import GELU, LeakyReLU, get_activation
from mindpet.utils.constants import DEFAULT_FLAGS, DEFAULT_MODES, DELTA_LIST
from mindpet.utils.exceptions import AbsolutePathError, LinkPathError, ModelConfigFreezeInfoError, ReadYamlFileError
from mindpet.utils.version_control import get_activation, get_dropout
from mindpet.utils.version_utils import is_version_ge, is_version_le
assert lora.LoRADense is LoRADense is third is mindpet.delta.LoRADense is mindpet_lite.LoRADense
assert again is AdapterDense and prefix is PrefixLayer and freeze is freeze_delta is mindpet_lite.freeze_delta
assert callback is mindpet_lite.TrainableParamsCheckPoint
assert callable(mindpet_sdk.finetune) and callable(mindpet_sdk.evaluate) and callable(mindpet_sdk.infer)
assert set(DELTA_LIST) >= {"lora", "prefixtuning", "adapter", "low_rank_adapter", "bitfit", "ptuning2"}
assert get_dropout(0.25).p == 0.25 and type(get_activation("gelu")).__name__ == "GELU"
from mindspore import nn
net = nn.SequentialCell(LoRADense(in_channels=4, out_channels=4, lora_rank=2, lora_alpha=2))
freeze_delta(model=net, mode="lora")
assert len(net.trainable_params()) == 2
try:
    import mindpet.no_such_module
except ModuleNotFoundError as error:
    assert "mindpet.no_such_module" in str(error)
mindpet_lite.install_as_mindpet()
assert sys.modules["mindpet.delta"] is mindpet.delta
"""
REFUSED = """
import sys, types
sys.modules["mindpet"] = real = types.ModuleType("mindpet")
import mindpet_lite
before = dict(sys.modules)
try:
    mindpet_lite.install_as_mindpet()
except RuntimeError as error:
    assert "imported already" in str(error) and "before the first import" in str(error)
else:
    raise SystemExit("not refused")
assert sys.modules["mindpet"] is real and not [name for name in sys.modules if name.startswith("mindpet.")]
"""


def run(code: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", "import sys\n" + code, *arguments], cwd=folder, text=True,
                          capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_documented_name_is_ours(tmp_path):
    run(DOCUMENTED, tmp_path)


def test_the_real_one_is_not_replaced_behind_its_back(tmp_path):
    run(REFUSED, tmp_path)


def test_without_the_call_nothing_is_called_mindpet(tmp_path):
    run("import mindpet_lite\nassert 'mindpet' not in sys.modules", tmp_path)


# Imports each module first of all, as a process of its own would, but for MindSpore, which takes seconds to load.
EACH_FIRST = """
for name in sys.argv[1:]:
    for loaded in [known for known in sys.modules if known.partition(".")[0] in ("mindpet", "mindpet_lite")]:
        del sys.modules[loaded]
    import mindpet_lite
    mindpet_lite.install_as_mindpet()
    exec(f"import {name}\\nassert {name}.__doc__, name")
    print(name)
"""


def test_every_module_of_the_table_imports(tmp_path):
    short = sorted(name for name in MODULES if name.count(".") < 2)
    assert run(EACH_FIRST, tmp_path, *short).split() == short
    assert all(name in short or name.rpartition(".")[0] in MODULES for name in MODULES)


@pytest.mark.parametrize("current, base, later, earlier", [
    ("2.10.0", "2.9.0", True, False), ("1.10.1", "2.0.0rc1", False, True), ("2.0.0", "2.0.0", True, True)])
def test_versions(current, base, later, earlier):
    assert is_version_ge(current, base) is later and is_version_le(current, base) is earlier


def test_a_version_without_a_dot_is_refused():
    with pytest.raises(ValueError, match="such as '2.10.0'"):
        is_version_ge("2", "1.0")
