"""Tasks: real scripts in real processes, their output, ends, children, folders, results, and what is refused."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import mindpet_lite
from mindpet_lite import tasks
from mindpet_lite.tasks import process
from mindpet_lite.tasks.options import seconds_of

ROOT = Path(mindpet_lite.__file__).parents[1]
# Writes its flags as JSON beside the output, and what a checkpoint would be.
DUMP = """
import json, sys
from pathlib import Path
flags = sys.argv[1:]
out = Path(flags[flags.index("--output_path") + 1])
(out / "model.ckpt").write_bytes(b"weights")
Path("flags.json").write_text(json.dumps([sys.executable, flags]))
"""
# A child that ignores SIGTERM, one in a session of its own, one without our environment, one with a child.
FAMILY = """
import subprocess, sys, time
from pathlib import Path
sleep = "import time; time.sleep(60)"
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
children = [subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE),
            subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True, stdout=subprocess.DEVNULL),
            subprocess.Popen([sys.executable, "-c", sleep], env={}),
            subprocess.Popen([sys.executable, "-c", nested])]
children[0].stdout.readline()
Path("pids.tmp").write_text(" ".join(str(child.pid) for child in children))
Path("pids.tmp").rename("pids")
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, checkpoint and output, as strict wants them, and a short grace."""
    for name in ("data", "out", "base"):
        (tmp_path / name).mkdir(mode=0o750)
    (tmp_path / "delta.ckpt").write_bytes(b"delta")
    (tmp_path / "delta.ckpt").chmod(0o640)
    monkeypatch.setattr(process, "GRACE", 1.0)
    return tmp_path


def script(body: str, name: str = "boot.py") -> str:
    Path(name).write_text(textwrap.dedent(body), encoding="utf-8")
    Path(name).chmod(0o640)
    return name


def result_script(text: str, name: str = "eval_result.json") -> str:
    return script(f"""
        import sys
        from pathlib import Path
        out = Path(sys.argv[sys.argv.index("--output_path") + 1])
        (out / {name!r}).write_bytes({text!r}.encode())
    """)


def config(text: str) -> str:
    Path("config.yaml").write_text(text, encoding="utf-8")
    Path("config.yaml").chmod(0o640)
    return "config.yaml"


def finetune(boot: str, **more) -> tasks.TaskResult:
    return tasks.finetune(data_path="data", output_path="out", boot_file_path=boot, **more)


def evaluate(boot: str, **more) -> tasks.TaskResult:
    return tasks.evaluate(data_path="data", ckpt_path="delta.ckpt", output_path="out", boot_file_path=boot, **more)


def flags() -> list[str]:
    return json.loads(Path("flags.json").read_text(encoding="utf-8"))[1]


def only_folder() -> Path:
    found = [path for path in Path("out").absolute().iterdir()]
    assert len(found) == 1, found
    return found[0]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def family() -> list[int]:
    return [int(pid) for pid in Path("pids").read_text().split()]


def caller(code: str, **more) -> subprocess.Popen:
    """Start a Python process of its own group that calls us, without the folder of the repository as its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}
    # Under nohup, tests ignore SIGHUP, and so do the processes they start.
    code = ("import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\nfrom mindpet_lite import tasks\n"
            "from mindpet_lite.tasks import process\nprocess.GRACE = 1.0\n") + code
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment, start_new_session=True)


CALL = "tasks.finetune(data_path='data', output_path='out', boot_file_path='boot.py'{more})\n"


# What the script gets, and what comes back

def test_defect_16_the_tasks_work_by_keyword_and_by_position(home):
    boot = script(DUMP)
    by_keyword = tasks.finetune(data_path="data", output_path="out", boot_file_path=boot)
    assert by_keyword == 0 and by_keyword.exit_code == 0 and by_keyword.result is None
    assert (by_keyword.output_path / "model.ckpt").read_bytes() == b"weights"
    by_position = tasks.finetune(home / "data", home / "out", boot, home / "base", config("params: {lr: 1}"), "1h")
    assert flags() == ["--lr", "1", "--output_path", str(by_position.output_path), "--pretrained_model_path",
                       str(home / "base"), "--data_path", str(home / "data")]
    boot = result_script('{"acc": 0.5}')
    assert tasks.evaluate("data", "delta.ckpt", "out", boot, None, "1h").result == {"acc": 0.5}
    assert evaluate(boot).result == {"acc": 0.5}


def test_output_folders_are_mindpets(home):
    first, second = finetune(script(DUMP)), finetune(script(DUMP))
    assert first.output_path != second.output_path
    for folder in (first.output_path, second.output_path):
        assert folder.parent == home / "out"
        assert folder.name.startswith("MINDPET_") and len(folder.name) == 8 + 32 and folder.name.isupper()
        assert folder.stat().st_mode & 0o777 == 0o750 & ~_umask()
        assert os.listdir(folder) == ["model.ckpt"]
    assert len(os.listdir("out")) == 2


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_folder_is_empty_when_the_script_starts(home):
    assert finetune(script("import os, sys; sys.exit(len(os.listdir(sys.argv[2])))")) == 0


def test_a_result_is_the_exit_code(home):
    good, bad = finetune(script("")), finetune(script("raise SystemExit(3)"))
    assert isinstance(good, int) and good == 0 == good.exit_code and bad == 3 == bad.exit_code
    assert "exit_code=3" in repr(bad)


@pytest.mark.parametrize("body, code", [
    ("raise SystemExit(7)", 7), ("raise ValueError('no')", 1), ("import os; os._exit(255)", 255),
    ("import os; os.kill(os.getpid(), 9)", 137), ("import os; os.abort()", 134), ("1 +", 1)])
def test_exit_codes_of_the_script(home, body, code):
    outcome = finetune(script(body))
    assert outcome.exit_code == code
    assert "{" not in (outcome.output_path / "UNFINISHED").read_text()    # defect 19: a message without its values


def test_params_become_flags_without_a_shell(home):
    path = config("""
        params:
          epochs: 3
          lr: 1.0e-4
          name: 'two words; $(rm -rf /) "quoted" * 中文'
          deep: true
          mixed: [1, 2.5, x y]
          negative: -1
          empty: ''
          day: 2024-01-31
    """)
    outcome = finetune(script(DUMP), model_config_path=path)
    assert flags() == ["--epochs", "3", "--lr", "0.0001", "--name", 'two words; $(rm -rf /) "quoted" * 中文', "--deep",
                       "True", "--mixed", "1", "2.5", "x y", "--negative", "-1", "--empty", "", "--day", "2024-01-31",
                       "--output_path", str(outcome.output_path), "--data_path", str(home / "data")]


def test_freeze_is_handed_on_for_finetune(home):
    path = config("freeze:\n  include: ['*']\n  exclude: ['*head*']\nparams:\n  lr: 1\n")
    finetune(script(DUMP), model_config_path=path)
    assert flags()[:4] == ["--lr", "1", "--advanced_config", str(home / path)]
    with pytest.raises(ValueError, match="expected only 'params' at the top, but got 'freeze'"):
        evaluate(script(DUMP), model_config_path=path)


def test_the_script_can_freeze_by_the_config_it_gets(home, monkeypatch):
    boot = script("""
        import argparse
        from mindspore import nn
        from mindpet_lite import freeze_from_config
        parser = argparse.ArgumentParser()
        for name in ("advanced_config", "data_path", "output_path"):
            parser.add_argument("--" + name)
        net = nn.SequentialCell(nn.Dense(2, 2), nn.Dense(2, 1))
        freeze_from_config(net, parser.parse_args().advanced_config)
        raise SystemExit(40 + len(net.trainable_params()))
    """)
    path = config("freeze: {include: ['*weight']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert finetune(boot, model_config_path=path).exit_code == 42


@pytest.mark.parametrize("text, message", [
    ("params: {data_path: x}", "'data_path' in params is an option of the task itself"),
    ("params: {advanced_config: x}", "option of the task"), ("params: {t: 1}", "option of the task"),
    ("params: {quiet: true}", "option of the task"), ("params: {a: }", "'a' in params has no value"),
    ("params: {a: []}", "no value"), ("params: {a: {b: 1}}", "'a' in params must be a text"),
    ("params: {a: [[1]]}", "'a' in params must be"), ("params: {a: [1, null]}", "'a' in params must be"),
    ("params: {a: --b}", "another flag"), ('params: {a: "x\\0"}', "'a' in params"),
    ("params: {--a: 1}", "cannot be the name of a flag"), ("params: {a b: 1}", "cannot be the name"),
    ("params: {a=b: 1}", "cannot be the name"), ("params: {on: 1}", "YAML reads the key True"),
    ("params: ", "params must hold keys and values"), ("params: [1]", "params must hold"), ("", "is empty"),
    ("param: {a: 1}", "Did you mean 'params'"), ("- 1", "list"), ("params: [", "not valid YAML"),
    ("freeze: {includ: ['*']}", "Did you mean 'include'"), ("freeze: ", "'freeze' block"),
    ("params: !!python/object/apply:os.system ['touch hacked']", "not valid YAML"),
])
def test_wrong_configs_are_refused_before_anything_starts(home, text, message):
    with pytest.raises(ValueError, match=message) as error:
        finetune(script(DUMP), model_config_path=config(text))
    assert "config.yaml" in str(error.value)
    assert not os.listdir("out") and not Path("flags.json").exists() and not Path("hacked").exists()


def test_defect_07_configs_are_only_read(home):
    config("params: {lr: 1}")
    Path("config.yaml").chmod(0o440)
    script(DUMP)
    code = """
import os, sys
seen = []
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("config.yaml"):
        seen.append(arguments[2])
sys.addaudithook(hook)
""" + CALL.format(more=", model_config_path='config.yaml'") + """
assert seen and not any(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) for flags in seen), seen
"""
    process_of_caller = caller(code)
    errors = process_of_caller.communicate(timeout=60)[1]
    assert process_of_caller.returncode == 0, errors
    assert flags()[:2] == ["--lr", "1"]
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        finetune(script(DUMP), model_config_path="nowhere.yaml")
    assert not Path("nowhere.yaml").exists() and len(os.listdir("out")) == 1


def test_defect_19_the_script_runs_under_this_python(home, monkeypatch):
    os.symlink(sys.executable, "python-of-this-venv")
    monkeypatch.setattr(sys, "executable", str(home / "python-of-this-venv"))
    (home / "bin").mkdir()
    (home / "bin" / "python").write_text("#!/bin/sh\nexit 99\n")
    (home / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("PATH", str(home / "bin"))
    assert finetune(script(DUMP)).exit_code == 0
    assert json.loads(Path("flags.json").read_text())[0] == str(home / "python-of-this-venv")


@pytest.mark.parametrize("task, option", [("finetune", "pretrained_model_path"), ("evaluate", "ckpt_path"),
                                          ("infer", "ckpt_path")])
def test_defect_20_models_may_be_folders_or_files(home, task, option):
    if task == "finetune":
        boot = script(DUMP)
    else:
        boot = result_script("[1]", "infer_result.json" if task == "infer" else "eval_result.json")
    for path in ("base", "delta.ckpt"):
        outcome = getattr(tasks, task)(data_path="data", output_path="out", boot_file_path=boot, **{option: path})
        assert outcome.exit_code == 0 and outcome.result == (None if task == "finetune" else [1])


def test_defect_17_home_is_neither_needed_nor_written(home):
    (home / "empty").mkdir()
    script("print('ran')")
    for drop in (True, False):
        environment = {"HOME": str(home / "empty")}
        code = ("import os; os.environ.pop('HOME')\n" if drop else "") + CALL.format(more="") + "print('went on')"
        process_of_caller = caller(code, **environment)
        output, errors = process_of_caller.communicate(timeout=60)
        assert process_of_caller.returncode == 0, errors
        assert output.split() == ["ran", "went", "on"]
        assert os.listdir(home / "empty") == []
    bare = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run([sys.executable, "-m", "mindpet_lite", "run", "finetune", "-dp", "data", "-op", "out", "-bp",
                           "boot.py"], env={**bare, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ran\n", done.stderr


# Output

def test_output_is_live(home):
    script("""
        import sys, time
        from pathlib import Path
        print("first line")
        print("to stderr", file=sys.stderr)
        print("\\r50%", end="")
        while not Path("go").exists():
            time.sleep(0.02)
        print("\\r100%\\nlast line without an end", end="")
    """)
    running = caller(CALL.format(more=", quiet=True"))
    seen = b""
    try:
        while not seen.endswith(b"50%"):
            chunk = os.read(running.stdout.fileno(), 1000)
            assert chunk, running.communicate()
            seen += chunk
        assert running.poll() is None
        Path("go").touch()
        while chunk := os.read(running.stdout.fileno(), 1000):
            seen += chunk
        assert running.wait(60) == 0 and running.stderr.read() == ""
    finally:
        Path("go").touch()
        running.kill()
        running.communicate()
    assert seen == b"first line\nto stderr\n\r50%\r100%\nlast line without an end"


def test_defect_18_nothing_is_lost_and_nothing_is_undecodable(home, capfd):
    outcome = finetune(script(r"""
        import os, sys
        raw = sys.stdout.buffer
        raw.write(b"bad \xff\xfe byte, cut \xe4\xb8")
        raw.write("character 中".encode())
        raw.write(b"x" * 500_000 + b"\nend \xe4\xb8")
        raw.flush()
        os._exit(0)
    """))
    output = capfd.readouterr().out
    assert outcome == 0 and output.startswith("bad \ufffd\ufffd byte, cut \ufffdcharacter 中")
    assert output.count("x") == 500_000 and output.endswith("\nend \ufffd")


def test_defect_18_what_a_script_wrote_last_is_shown_even_to_a_slow_reader(home, monkeypatch):
    shown = []

    def slow(text: str) -> None:
        shown.append(text)
        time.sleep(0.5)    # the script has ended before we look again

    monkeypatch.setattr(process, "echo", slow)
    assert finetune(script("import time\nprint('first')\ntime.sleep(0.1)\nprint('last' * 10_000)")) == 0
    assert "".join(shown) == "first\n" + "last" * 10_000 + "\n"


def test_a_stream_without_the_characters_is_no_obstacle(home, monkeypatch):
    with open("log", "w", encoding="ascii") as log:
        monkeypatch.setattr(sys, "stdout", log)
        assert finetune(script("print('中文 text')")) == 0
    assert Path("log").read_text() == "?? text\n"
    monkeypatch.setattr(sys, "stdout", None)
    assert finetune(script("print('no one listens')")) == 0


def test_scripts_have_no_standard_input(home):
    assert finetune(script("import sys; sys.exit(len(sys.stdin.read()))")) == 0


def test_a_child_left_behind_by_a_successful_script_neither_blocks_nor_dies(home, capfd):
    began = time.monotonic()
    assert finetune(script("""
        import subprocess, sys
        from pathlib import Path
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
        Path("pids").write_text(str(child.pid))
        print("done")
    """)) == 0
    assert time.monotonic() - began < 10 and capfd.readouterr().out == "done\n"
    assert alive(family()[0])
    os.kill(family()[0], signal.SIGKILL)


def test_quiet_leaves_the_output_of_the_script_alone(home, capfd):
    finetune(script("print('script')"), quiet=True)
    assert capfd.readouterr() == ("script\n", "")
    outcome = finetune(script("print('script')"))
    assert capfd.readouterr() == ("script\n", f"mindpet-lite: finetune writes to {outcome.output_path}\n")


# Ends

@pytest.mark.parametrize("text, seconds", [
    ("1d2h", 93600), ("1d", 86400), ("2h", 7200), ("30m", 1800), ("1h30m", 5400), ("45s", 45), ("1d 2H", 93600),
    (" 1D2h3m4s ", 93784), ("48h", 172800), ("0d1h", 3600), ("26h", 93600), ("007s", 7), (None, None)])
def test_timeouts(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["0h", "0d0h", "26x", "-1h", "", " ", "h", "1", "1.5h", "2h1d", "1h1h", "1d-2h",
                                  "1e3s", "١h", "1h\x00", "9" * 5000 + "h", "inf"])
def test_wrong_timeouts(home, text):
    with pytest.raises(ValueError, match="timeout must be days, hours, minutes and seconds.*30m"):
        finetune(script(DUMP), timeout=text)
    assert not os.listdir("out")


def test_timeouts_are_text(home):
    for value in (3, 1.5, True, ["1h"]):
        with pytest.raises(TypeError, match="timeout must be text such as '1d2h'"):
            finetune(script(DUMP), timeout=value)


def test_defect_18_a_timeout_ends_the_script_and_all_its_children_but_not_the_caller(home, capfd):
    own_group = os.getpgid(0)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])    # of the caller's group
    try:
        with pytest.raises(TimeoutError, match="did not end within its timeout of 1s.*UNFINISHED") as error:
            finetune(script(DUMP + FAMILY + "print('before the end', flush=True)\ntime.sleep(60)"), timeout="1s")
        assert len(family()) == 4 and not any(map(alive, family()))
        assert os.getpgid(0) == own_group and bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert "before the end" in capfd.readouterr().out
    folder = only_folder()
    assert str(folder) in str(error.value)
    assert (folder / "model.ckpt").read_bytes() == b"weights"          # the checkpoints of a timed-out run are kept
    assert "timeout of 1s" in (folder / "UNFINISHED").read_text()
    assert sorted(os.listdir(folder)) == ["UNFINISHED", "model.ckpt"]


def test_the_caller_goes_on_after_a_timeout(home):
    script("import time; time.sleep(60)")
    call = CALL.format(more=", timeout='1s'")
    running = caller(f"try:\n    {call}except TimeoutError:\n    print('caught')\nprint('alive')")
    output, errors = running.communicate(timeout=60)
    assert running.returncode == 0 and output.split() == ["caught", "alive"], errors


def test_what_the_script_says_while_it_ends_is_shown(home, capfd):
    with pytest.raises(TimeoutError):
        finetune(script("""
            import signal, sys, time
            def save(number, frame):
                print("saved a checkpoint")
                sys.exit(0)
            signal.signal(signal.SIGTERM, save)
            time.sleep(60)
        """), timeout="1s")
    assert "saved a checkpoint" in capfd.readouterr().out


def test_the_children_of_a_failed_script_are_ended(home):
    assert finetune(script(FAMILY + "sys.exit(5)")).exit_code == 5
    assert not any(map(alive, family()))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP),
                                          (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_to_the_caller_ends_the_script_and_its_children(home, number, code):
    script(FAMILY + "time.sleep(60)")
    running = caller(CALL.format(more="") + "print('not reached')")
    try:
        wait_for(Path("pids").exists)
        running.send_signal(number)
        output, errors = running.communicate(timeout=30)
    finally:
        running.kill()
    assert running.returncode == code and "not reached" not in output
    assert not any(map(alive, family()))
    assert signal.Signals(number).name in (only_folder() / "UNFINISHED").read_text()


def test_handlers_of_the_caller_are_kept(home):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    finetune(script(""))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    script(FAMILY + "time.sleep(60)")
    running = caller("import signal, sys\ndef leave(number, frame):\n    raise OverflowError('own handler')\n"
                     "signal.signal(signal.SIGTERM, leave)\n" + CALL.format(more=""))
    wait_for(Path("pids").exists)
    running.terminate()
    assert "OverflowError: own handler" in running.communicate(timeout=30)[1]
    assert not any(map(alive, family()))
    assert any("own handler" in (path / "UNFINISHED").read_text() for path in Path("out").iterdir()
               if (path / "UNFINISHED").exists())


def test_a_killed_caller_leaves_the_folder_marked_as_running(home):
    script("import time\nfrom pathlib import Path\nPath('pids').touch()\nfor _ in range(600):\n    print('.')\n"
           "    time.sleep(0.05)")
    running = caller(CALL.format(more=""))
    wait_for(Path("pids").exists)
    running.kill()
    running.communicate(timeout=30)
    assert [path.suffix for path in sorted(Path("out").iterdir())] == ["", ".running"]


def test_tasks_run_in_threads_too(home):
    outcomes = []
    boot = script("")
    threads = [threading.Thread(target=lambda: outcomes.append(finetune(boot))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]


def test_a_task_within_a_task_ends_with_it(home, monkeypatch):
    script(FAMILY + "time.sleep(60)", "inner.py")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(TimeoutError):
        finetune(script("from mindpet_lite import tasks\ntasks.finetune('data', 'out', 'inner.py')"), timeout="6s")
    assert len(family()) == 4 and not any(map(alive, family()))


# Results

@pytest.mark.parametrize("text, value", [('{"acc": 0.5, "名": [1, null]}', {"acc": 0.5, "名": [1, None]}), ("[]", []),
                                         ("0", 0), ("null", None), ("\ufeff{}", {})])
def test_results_are_parsed(home, text, value):
    outcome = evaluate(result_script(text))
    assert outcome.exit_code == 0 and outcome.result == value
    assert os.listdir(outcome.output_path) == ["eval_result.json"] and os.listdir("out") == [outcome.output_path.name]
    assert tasks.infer("data", "delta.ckpt", "out", result_script(text, "infer_result.json")).result == value


@pytest.mark.parametrize("text", ["", '{"acc": 0.', "acc=1", "[" * 100_000])
def test_damaged_results_are_errors_and_lose_their_name(home, text):
    with pytest.raises(ValueError, match="eval_result.json in .*, now eval_result.json.partial, is no valid JSON"):
        evaluate(result_script(text))
    folder = only_folder()
    assert sorted(os.listdir(folder)) == ["UNFINISHED", "eval_result.json.partial"]
    assert (folder / "eval_result.json.partial").read_text() == text


def test_missing_results_are_errors(home):
    for body in ("", "import os, sys; os.mkdir(sys.argv[2] + '/eval_result.json')"):
        with pytest.raises(FileNotFoundError, match="wrote no eval_result.json"):
            evaluate(script(body))


def test_a_failed_script_leaves_no_result(home):
    boot = result_script('{"acc": 1}')
    with open(boot, "a") as file:
        file.write("sys.exit(4)\n")
    outcome = evaluate(boot)
    assert (outcome, outcome.exit_code, outcome.output_path, outcome.result) == (4, 4, only_folder(), None)
    assert sorted(os.listdir(only_folder())) == ["UNFINISHED", "eval_result.json.partial"]


def test_a_timed_out_script_leaves_no_result(home):
    boot = result_script('{"acc": 0.')
    with open(boot, "a") as file:
        file.write("import time; time.sleep(60)\n")
    with pytest.raises(TimeoutError):
        evaluate(boot, timeout="1s")
    assert sorted(os.listdir(only_folder())) == ["UNFINISHED", "eval_result.json.partial"]


# Paths

def test_all_problems_in_one_message_and_nothing_started(home):
    Path("plain.txt").touch()
    with pytest.raises(ValueError) as error:
        tasks.finetune(data_path="nowhere", output_path="plain.txt", boot_file_path="plain.txt", timeout="0h",
                       model_config_path="data", pretrained_model_path="")
    message = str(error.value)
    for part in ("data_path: ", "nowhere does not exist", "output_path must be a folder", "timeout must be",
                 "boot_file_path must be a .py", "model_config_path must be a .yaml or .yml file", "is a folder",
                 "pretrained_model_path must be a path"):
        assert part in message
    assert "\n" not in message and not os.listdir("out")


@pytest.mark.parametrize("name, value, error, message", [
    ("data_path", "nowhere", FileNotFoundError, "data_path: .*nowhere does not exist"),
    ("data_path", "boot.py/x", FileNotFoundError, "data_path: .* does not exist"),
    ("data_path", 3, TypeError, "data_path must be a path, but got 3"),
    ("data_path", None, TypeError, "data_path must be a path"), ("data_path", b"data", TypeError, "data_path must be"),
    ("data_path", "", ValueError, "data_path must be a path"), ("data_path", "a\0b", ValueError, "data_path must be"),
    ("data_path", "x" * 300, OSError, "data_path: .*name too long"),
    ("data_path", "/dev/null", ValueError, "folder or a file"),
    ("output_path", "nowhere", FileNotFoundError, "output_path"),
    ("output_path", "boot.py", NotADirectoryError, "output_path must be a folder"),
    ("boot_file_path", "data", ValueError, "boot_file_path must be a .py file, but .*data is a folder"),
    ("boot_file_path", "delta.ckpt", ValueError, "boot_file_path must be a .py file, but .*delta.ckpt is none"),
    ("model_config_path", "delta.ckpt", ValueError, "model_config_path must be a .yaml or .yml file"),
    ("quiet", "no", TypeError, "quiet must be True or False"), ("strict", 1, TypeError, "strict must be"),
    ("no_follow", None, TypeError, "no_follow must be"),
])
def test_wrong_arguments_are_named(home, name, value, error, message):
    arguments = {"data_path": "data", "output_path": "out", "boot_file_path": script(DUMP), name: value}
    with pytest.raises(error, match=message):
        tasks.finetune(**arguments)
    assert not os.listdir("out") and not Path("nowhere").exists()


@pytest.mark.parametrize("name, needed, message", [
    ("data_path", os.R_OK, "data_path: you may not read"),
    ("output_path", os.W_OK, "output_path: you may not write to"),
    ("boot_file_path", os.R_OK, "boot_file_path: you may not read")])
def test_paths_must_be_accessible(home, name, needed, message, monkeypatch):
    arguments = {"data_path": "data", "output_path": "out", "boot_file_path": script(DUMP)}
    closed, real = Path(arguments[name]).absolute(), os.access    # root may do everything: ask for less than that
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and not (path == closed and mode & needed))
    with pytest.raises(PermissionError, match=message):
        tasks.finetune(**arguments)
    assert not os.listdir("out")


def test_links_are_followed_unless_told_otherwise(home):
    for name in ("data", "out"):
        os.symlink(name, f"{name}-link")
    os.symlink(script(DUMP), "boot-link.py")
    arguments = {"data_path": "data-link", "output_path": "out-link", "boot_file_path": "boot-link.py"}
    assert tasks.finetune(**arguments) == 0
    with pytest.raises(ValueError) as error:
        tasks.finetune(**arguments, no_follow=True)
    for name, real in (("data_path", "data"), ("output_path", "out"), ("boot_file_path", "boot.py")):
        assert f"{name}: {home}/" in str(error.value) and str(home / real) in str(error.value)
    os.symlink("nowhere", "broken")
    with pytest.raises(FileNotFoundError, match="broken is a link to .*nowhere, which does not exist"):
        tasks.finetune(data_path="broken", output_path="out", boot_file_path="boot.py")
    os.symlink("loop", "loop")
    with pytest.raises(OSError, match="data_path: .*loop"):
        tasks.finetune(data_path="loop", output_path="out", boot_file_path="boot.py")


def test_a_link_higher_up_counts(home):
    (home / "real" / "data").mkdir(parents=True)
    os.symlink("real", "upper")
    assert tasks.finetune(data_path="upper/data", output_path="out", boot_file_path=script(DUMP)) == 0
    for path in ("upper/data", "upper/data/", "upper/../data"):
        with pytest.raises(ValueError, match="upper is a symlink"):
            tasks.finetune(data_path=path, output_path="out", boot_file_path="boot.py", no_follow=True)


def strictly(home: Path, **more) -> tasks.TaskResult:
    return tasks.finetune(**{"data_path": home / "data", "output_path": home / "out",
                             "boot_file_path": home / script(DUMP), "strict": True, **more})


def test_strict_accepts_what_mindpet_accepts(home):
    assert strictly(home, pretrained_model_path=home / "base", model_config_path=home / config("params: {a: 1}")) == 0


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o770, 0o751])
def test_strict_refuses_open_modes(home, mode):
    (home / "data").chmod(mode)
    with pytest.raises(PermissionError, match=f"data_path: .* has mode {mode:o}, but strict allows 750 at most"):
        strictly(home)
    assert finetune(script(DUMP)) == 0


def test_strict_refuses_other_owners(home, monkeypatch):
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(PermissionError, match=f"data_path: .* belongs to user {me}, not to you"):
        strictly(home)


def test_strict_refuses_relative_paths_and_links(home):
    with pytest.raises(ValueError, match="data_path must be absolute with strict, but got data"):
        strictly(home, data_path="data")
    os.symlink("data", "link")
    with pytest.raises(ValueError, match="link is a symlink"):
        strictly(home, data_path=home / "link")


def test_strict_refuses_an_output_inside_an_input(home):
    (home / "data" / "out").mkdir(mode=0o750)
    for output in ("data", "data/out"):
        with pytest.raises(ValueError, match="is or lies in data_path"):
            strictly(home, output_path=home / output)
    assert tasks.finetune("data", "data/out", script(DUMP)) == 0


def test_quiet_and_strict_warn_of_modes_but_not_for_the_script(home, capfd):
    (home / "data").chmod(0o777)
    assert strictly(home, quiet=True) == 0
    assert "warning: data_path: " in capfd.readouterr().err
    script(DUMP)
    (home / "boot.py").chmod(0o666)
    with pytest.raises(PermissionError, match="boot_file_path"):
        tasks.finetune(home / "data", home / "out", home / "boot.py", quiet=True, strict=True)


def test_a_script_that_cannot_be_started_is_told(home, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(OSError, match="/nowhere/python"):
        finetune(script(""))
    assert os.listdir(only_folder()) == ["UNFINISHED"]


def test_a_child_in_a_session_and_an_environment_of_its_own_is_ended(home):
    with pytest.raises(TimeoutError):
        finetune(script("""
            import subprocess, sys, time
            from pathlib import Path
            sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
            child = subprocess.Popen(sleep, start_new_session=True, env={})
            Path("pids").write_text(str(child.pid))
            time.sleep(60)
        """), timeout="2s")
    assert not alive(int(Path("pids").read_text()))
