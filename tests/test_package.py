"""The package as a whole: public names, what import does, and which file may import which."""
from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mindpet_lite

ROOT = Path(mindpet_lite.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
# Where MindPet has R-Drop.
MINDPETS_PLACE = Path("delta", "r_drop.py")
METHOD_NAMES = {"LoRADense", "LoraConfig", "LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRAEmbedding", "LoRALinear",
                "BitFitConfig", "AdapterConfig", "AdapterDense", "AdapterLayer",
                "LowRankAdapterConfig", "LowRankAdapterDense", "LowRankAdapterLayer", "PrefixDense", "PrefixEncoder",
                "PrefixLayer", "PrefixTuningConfig", "Ptuning2Config", "Ptuning2Dense", "prefix_mask",
                "prepend_prefix", "PromptTuningConfig", "PromptEncoderConfig", "MultitaskPromptTuningConfig",
                "prompt_mask"}
TRAIN_NAMES = {"BatchSampler", "DeltaEMA", "GradientAccumulation", "HealthCallback", "Interrupts", "TrainingState",
               "clip_global_norm", "init_data_parallel", "lora_plus_groups"}
PUBLIC = METHOD_NAMES | TRAIN_NAMES | {
    "install_as_mindpet", "get_pet_model", "merge", "unmerge", "net_recompute", "undo_recompute", "summary",
    "save_adapter", "load_adapter", "refresh_base", "set_lora_scale", "adapters_disabled", "check_adapters",
    "fold_prefixes", "TrainableParamsCheckPoint", "freeze_delta",
    "freeze_modules", "freeze_from_config", "freeze_statistics", "check_optimizer"}

IMPORT = """
import builtins, logging, os, sys
import mindspore
modules, handlers = set(sys.modules), list(logging.root.handlers)
loggers = {name: list(getattr(item, "handlers", [])) for name, item in logging.root.manager.loggerDict.items()}
opened, original = [], builtins.open
def recording(file, mode="r", *args, **kwargs):
    opened.append((file, mode))
    return original(file, mode, *args, **kwargs)
builtins.open = recording
import mindpet_lite, mindpet_lite.compat, mindpet_lite.delta, mindpet_lite.graph, mindpet_lite.train
assert not [item for item in opened if set(item[1]) & set("wax+")], opened
assert handlers == logging.root.handlers
for name, item in logging.root.manager.loggerDict.items():
    assert list(getattr(item, "handlers", [])) == loggers.get(name, []), name
assert os.listdir(".") == [] and os.listdir(os.environ["HOME"]) == [], "import wrote a file"
print(" ".join(sorted(set(sys.modules) - modules)))
"""


# The modules of the methods: a folder's config stands for the folder.
METHOD_MODULES = {kind.__module__ for kind in mindpet_lite.delta.METHODS.values()} | {"mindpet_lite.delta.lora"}


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found.add(node.module)
    return found


def test_public_names():
    from mindpet_lite import delta, graph, train
    rooms = (delta, graph, train)
    names = [name for room in rooms for name in room.__all__]
    assert len(set(names)) == len(names)
    assert set(mindpet_lite.__all__) == {*names, "install_as_mindpet"} - {"METHODS", "Delta", "DeltaConfig"}
    assert set(mindpet_lite.__all__) >= PUBLIC
    assert all(hasattr(mindpet_lite, name) for name in [*PUBLIC, "__version__"])
    for room in rooms:
        for name in room.__all__:
            assert name not in mindpet_lite.__all__ or getattr(room, name) is getattr(mindpet_lite, name)
    assert {kind.__name__ for kind in delta.METHODS.values()} <= set(mindpet_lite.__all__)


def test_import_writes_nothing_and_loads_nothing_heavy(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=tmp_path / "here", capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent), "HOME": str(tmp_path / "home"),
             "PYTHONDONTWRITEBYTECODE": "1"})
    assert result.returncode == 0, result.stderr
    added = {name.partition(".")[0] for name in result.stdout.split()}
    assert not added & {"matplotlib", "PIL", "torch", "tqdm", "pandas", "scipy", "resvg_py", "transformers", "pytest"}


def test_names_come_when_they_are_asked_for(tmp_path):
    code = ("import sys, mindpet_lite, mindpet_lite.commands; assert 'mindspore' not in sys.modules\n"
            "mindpet_lite.LoRADense, mindpet_lite.graph.merge; assert 'mindspore' in sys.modules\n"
            "from mindpet_lite import *; assert LoraConfig is mindpet_lite.LoraConfig\n"
            "assert {'delta', 'merge', '__version__'} <= set(dir(mindpet_lite))")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120,
                   env={**os.environ, "PYTHONPATH": str(ROOT.parent), "PYTHONDONTWRITEBYTECODE": "1"})
    with pytest.raises(ImportError, match="'LoRADence' from 'mindpet_lite'"):
        from mindpet_lite import LoRADence  # noqa: F401


def test_arrows_point_one_way():
    for path in FILES:
        room = path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""
        own = {name for name in imports_of(path) if name.split(".")[0] == "mindpet_lite"}
        outside = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names) - {"mindpet_lite"}
        name = path.relative_to(ROOT)
        if room == "formats":
            assert outside <= {"numpy"}, name
            assert all(item.startswith(("mindpet_lite.formats", "mindpet_lite.names", "mindpet_lite.arguments"))
                       for item in own), name
        elif room == "names":
            assert not outside, name
            assert all(item.startswith("mindpet_lite.names") for item in own), name
        elif room == "offline":
            assert outside <= {"numpy", "safetensors", "tqdm"}, name
            assert all(item.startswith(("mindpet_lite.formats", "mindpet_lite.arguments", "mindpet_lite.names",
                                        "mindpet_lite.offline")) for item in own), name
        elif room == "delta" and path != ROOT / "delta" / "__init__.py":
            # A method may import what methods share, and what is numpy alone: never another method.
            assert not {item for item in own if item in METHOD_MODULES and not item.startswith(
                "mindpet_lite." + ".".join(name.parts[:2]).removesuffix(".py"))}, name
            rooms = {".".join(item.split(".")[:2]) for item in own}
            known = {f"mindpet_lite.{item}" for item in ("arguments", "delta", "formats", "names")}
            assert rooms <= known or name == MINDPETS_PLACE, name
        elif room == "graph":
            methods = {item for item in own if item.startswith("mindpet_lite.delta.")} - {
                "mindpet_lite.delta.base", "mindpet_lite.delta.delta_config", "mindpet_lite.delta.parts",
                "mindpet_lite.delta.values",
                "mindpet_lite.delta.dropout", "mindpet_lite.delta.source", "mindpet_lite.delta.data_start",
                # The kinds of layers are no methods.
                "mindpet_lite.delta.hosts", "mindpet_lite.delta.hosts.split"}
            assert not methods, f"{name} imports a method's file: {methods}"
            assert "mindpet_lite" not in own and "mindpet_lite.cli" not in own, name
        elif room == "train":
            rooms = {".".join(item.split(".")[:2]) for item in own}
            assert rooms <= {f"mindpet_lite.{item}" for item in (
                "arguments", "delta", "graph", "formats", "train")}, name
            assert not {item for item in own if item.startswith("mindpet_lite.delta.")} - {
                "mindpet_lite.delta.base", "mindpet_lite.delta.delta_config", "mindpet_lite.delta.parts",
                "mindpet_lite.delta.values",
                "mindpet_lite.delta.source"}, (
                f"{name} imports a method's file")
        assert "mindpet_lite.train" not in {".".join(item.split(".")[:2]) for item in own} or room in (
            "", "train") or name == MINDPETS_PLACE, f"{name}: nothing is built on the aids of training"
        assert "mindpet_lite.estimate" not in {".".join(item.split(".")[:2]) for item in own} or room in (
            "", "estimate"), f"{name}: only the command line estimates"
        assert "yaml" not in outside or path == ROOT / "yaml_files.py", f"{name}: only yaml_files.py reads YAML"
        assert "click" not in outside or path.parent == ROOT, f"{name}: only the command line knows click"
        assert "tqdm" not in outside or room == "offline", f"{name}: only long work on files has a progress bar"
        assert "mindpet_lite.offline" not in {".".join(item.split(".")[:2]) for item in own} or room in (
            "", "offline"), f"{name}: only the command line works on files"
        assert outside <= {"mindspore", "numpy", "yaml", "safetensors", "click", "tqdm"}, name


def test_graph_knows_no_method_by_name():
    for path in (ROOT / "graph").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not (names | imported) & {"LoRADense", "LoraConfig"}, path.name
        assert not any(isinstance(node, ast.Constant) and node.value == "lora" for node in ast.walk(tree)), path.name


def test_mindspores_privates_stay_in_one_file():
    privates = {"_cells", "_params", "cell_list", "compile_cache", "_compile_cache", "_recompute", "_recompute_cell",
                "_scope", "_forward_hook", "_has_config_recompute", "_func_graph_flags", "_param_prefix"}
    for path in FILES:
        used = {node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute)}
        if path != ROOT / "graph" / "tree.py":
            assert not used & privates, path
        assert not any(name.startswith("mindspore.") and "._" in name for name in imports_of(path)), path


def test_no_asserts_prints_exits_or_logging_in_the_package():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), f"{path} asserts"
        calls = {node.func.id for node in ast.walk(tree)
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not calls & {"exit", "quit", "exec", "eval"}, path
        assert "print" not in calls or path.name in ("summary.py", "peft_calls.py"), path
        processes = {"subprocess"} if path == ROOT / "tasks" / "process.py" else set()
        assert not imports_of(path) & {"logging", "pickle", "subprocess"} - processes, path
