"""What every test gets: a folder of its own, fixed seeds, and on request both execution modes."""
from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

MODES = {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}
SHARED = Path(__file__).parents[2] / "shared"
# Waiting for each other, the threads that launch PyNative's operators spin, ten times as long as the small nets of the
# tests compute. A process decides once: tests/test_asynchronous.py starts another for laws under asynchronous launch.
if not os.environ.get("MINDPET_LITE_TESTS_ASYNCHRONOUS"):
    ms.runtime.launch_blocking()


def pytest_collection_finish() -> None:
    """Let the garbage collector, which MindSpore calls at every compile, pass over all modules and collected tests."""
    gc.collect()
    gc.freeze()
    # When a compiled cell dies, MindSpore looks through all graphs of the process, four times for each graph of the
    # cell: a quarter of the suite's time. The graphs stay until the process ends.
    type(ms.nn.Cell.compile.__globals__["_cell_graph_executor"]).del_net_res = lambda *_: None


@pytest.fixture(autouse=True, scope="module")
def what_a_file_leaves_is_passed_over() -> Iterator[None]:
    """Let the garbage collector pass over what the files before have left as well."""
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture(autouse=True)
def own_folder_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore drops files where it runs: let that be the test's own folder."""
    monkeypatch.chdir(tmp_path)
    ms.set_seed(1)
    np.random.seed(1)


@pytest.fixture(params=sorted(MODES))
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test in graph mode and in PyNative mode."""
    before = ms.get_context("mode")
    ms.set_context(mode=MODES[request.param])
    yield request.param
    ms.set_context(mode=before)


@pytest.fixture
def graph_mode() -> Iterator[None]:
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def pynative_mode() -> Iterator[None]:
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def shared() -> Path:
    """The fixtures beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared fixtures are not at {SHARED}")
    return SHARED
