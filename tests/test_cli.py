"""The command line: exit codes, one sentence for every error, help, and the same outcome as the functions."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mindpet_lite
from mindpet_lite import tasks
from mindpet_lite.cli import main

pytest.importorskip("click")
ROOT = Path(mindpet_lite.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
GIVEN = {"finetune": ["-dp", "data", "-op", "out", "-bp", "boot.py"],
         "evaluate": ["-dp", "data", "-op", "out", "-bp", "boot.py", "-cp", "delta.ckpt"]}
GIVEN["infer"] = GIVEN["evaluate"]
WRITE = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--output_path") + 1])
for name in ("eval_result.json", "infer_result.json"):
    (out / name).write_text(json.dumps({"acc": 0.5, "flags": sys.argv[1:]}))
"""


@pytest.fixture(autouse=True)
def folders() -> None:
    Path("data").mkdir()
    Path("out").mkdir()
    Path("delta.ckpt").touch()
    Path("boot.py").write_text("print('ran')\n")


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m mindpet_lite ...`, or other code, in a process of its own."""
    start = ["-m", "mindpet_lite"] if code is None else ["-c", code]
    return subprocess.run([sys.executable, *start, *arguments], env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=60)


def test_python_m_is_the_command():
    done = run("run", "finetune", *GIVEN["finetune"])
    assert done.returncode == 0 and done.stdout == "ran\n"
    assert re.fullmatch(r"mindpet-lite: finetune writes to .*/out/MINDPET_[0-9A-F]{32}\n", done.stderr)
    done = run("--version")
    assert done.returncode == 0 and mindpet_lite.__version__ in done.stdout


@pytest.mark.parametrize("task", ["finetune", "evaluate", "infer"])
def test_every_option_in_both_spellings_gives_what_the_function_gives(task, capfd):
    Path("boot.py").write_text(WRITE + "print('live')\n")
    Path("config.yaml").write_text("params: {lr: 1}\n")
    model = "pretrained_model_path" if task == "finetune" else "ckpt_path"
    short = ["-dp", "data", "-op", "out", "-bp", "boot.py", "-mc", "config.yaml", "-t", "1h", "-q",
             "-pm" if task == "finetune" else "-cp", "delta.ckpt"]
    given = {"data_path": "data", "output_path": "out", "boot_file_path": "boot.py", "timeout": "1h",
             "model_config_path": "config.yaml", model: "delta.ckpt"}
    long = [text for name, value in given.items() for text in (f"--{name}", value)] + ["--quiet", "--no-follow"]
    outputs = []
    for arguments in (short, long):
        assert main(["run", task, *arguments]) == 0
        output, errors = capfd.readouterr()
        assert errors == ""
        outputs.append(re.sub("MINDPET_[0-9A-F]{32}", "MINDPET", output))
    by_function = getattr(tasks, task)(**given, quiet=True)
    output, errors = capfd.readouterr()
    assert by_function.exit_code == 0 and output == "live\n" and errors == ""
    expected = "" if task == "finetune" else json.dumps(by_function.result) + "\n"
    expected = re.sub("MINDPET_[0-9A-F]{32}", "MINDPET", "live\n" + expected)
    assert outputs == [expected, expected]


@pytest.mark.parametrize("code", [0, 1, 2, 7, 255])
def test_the_exit_code_is_the_scripts(code, capfd):
    Path("boot.py").write_text(f"raise SystemExit({code})")
    assert main(["run", "finetune", *GIVEN["finetune"]]) == code
    assert tasks.finetune("data", "out", "boot.py").exit_code == code
    errors = capfd.readouterr().err
    assert f"failed with exit code {code}; what it wrote is in " in errors if code else "failed" not in errors


def test_a_script_killed_by_a_signal_is_told_as_a_shell_tells_it(capfd):
    Path("boot.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert main(["run", "finetune", *GIVEN["finetune"]]) == 128 + 9
    assert "finetune was ended by Killed (signal 9)" in capfd.readouterr().err


@pytest.mark.parametrize("arguments, sentence", [
    ([], "Missing command; see mindpet-lite --help.$"),
    (["run"], "Missing command; see mindpet-lite run --help.$"),
    (["run", "train"], "No such command 'train'"),
    (["run", "finetune", "-op", "out", "-bp", "boot.py"], "Missing option '-dp' / '--data_path'"),
    (["run", "finetune", *GIVEN["finetune"], "-cp", "x"], "No such option.*-c"),
    (["run", "finetune", *GIVEN["finetune"], "more"], "unexpected extra argument"),
    (["run", "evaluate", *GIVEN["finetune"]], "Missing option '-cp' / '--ckpt_path'"),
    (["run", "finetune", *GIVEN["finetune"], "-t", "26x"], "timeout must be days, hours, minutes and seconds"),
    (["run", "finetune", *GIVEN["finetune"], "-t"], "requires a"),
    (["run", "finetune", *GIVEN["finetune"], "-mc", "nowhere.yaml"], "model_config_path: .*nowhere.yaml does not"),
    (["run", "finetune", "-dp", "no", "-op", "boot.py", "-bp", "data"],
     "data_path: .*no does not exist; .*output_path must be a folder, .*boot_file_path must be a .py file"),
    (["run", "finetune", *GIVEN["finetune"], "--strict"], "data_path must be absolute with strict"),
    (["run", "evaluate", *GIVEN["evaluate"], "-q"], "The script succeeded but wrote no eval_result.json"),
])
def test_errors_are_one_sentence_and_exit_2(arguments, sentence, capfd):
    assert main(arguments) == 2
    output, errors = capfd.readouterr()
    assert re.search(sentence, errors) and errors.startswith("mindpet-lite: ") and errors.count("\n") == 1
    assert output == ("ran\n" if "-q" in arguments else "")


def test_config_errors_are_one_line(capfd):
    for text in ("params: [", "a: 1\n b: 2\n", "freeze: {include: x}\n? [\n"):
        Path("config.yaml").write_text(text)
        assert main(["run", "finetune", *GIVEN["finetune"], "-mc", "config.yaml"]) == 2
        errors = capfd.readouterr().err
        assert "config.yaml" in errors and errors.count("\n") == 1, errors


def test_a_timeout_has_its_own_exit_code():
    # Five seconds, because on a busy machine a script may take more than one to start.
    Path("boot.py").write_text("import time\nprint('started')\ntime.sleep(60)\n")
    done = run("run", "finetune", *GIVEN["finetune"], "-t", "5s", "-q")
    assert done.returncode == 124 and done.stdout == "started\n"
    assert re.fullmatch(r"mindpet-lite: finetune did not end within its timeout of 5s .*, marked UNFINISHED\.\n",
                        done.stderr)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_end_the_command_and_the_script(number, code):
    Path("boot.py").write_text("import os, time\nprint(os.getpid())\ntime.sleep(60)\n")
    running = subprocess.Popen([sys.executable, "-m", "mindpet_lite", "run", "finetune", *GIVEN["finetune"]],
                               env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = int(running.stdout.readline())
    running.send_signal(number)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == code
    assert f"finetune was ended by {signal.Signals(number).name} sent to its caller" in errors
    assert "mindpet_lite/" not in errors    # the script's traceback goes to standard output; we have none
    time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text()


def test_a_reader_that_leaves_early_gets_no_traceback():
    Path("boot.py").write_text("for i in range(200_000):\n    print(i)\n")
    arguments = " ".join(["run", "finetune", *GIVEN["finetune"]])
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m mindpet_lite {arguments} | head -n 1"], text=True,
                          env=ENVIRONMENT, capture_output=True, timeout=60)
    assert done.stdout == "0\n" and "Traceback" not in done.stderr


def test_without_click_one_sentence_says_how_to_get_it():
    done = run("run", "finetune", code="import sys; sys.modules['click'] = None\n"
                                       "from mindpet_lite import tasks\nfrom mindpet_lite.cli import main\n"
                                       "sys.exit(main())")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("mindpet-lite: the command line needs click, which is not installed; call: "
                           "pip install 'click>=8'\n")


def test_json_says_how_a_task_ended_and_the_script_prints_beside_it(capfd):
    Path("boot.py").write_text(WRITE + "print('live')\n")
    for task in ("finetune", "evaluate"):
        assert main(["run", task, *GIVEN[task], "-q", "--json"]) == 0
        output, errors = capfd.readouterr()
        report = json.loads(output)
        assert report.keys() == {"exit_code", "output_path", "result"} and errors == "live\n"
        folder = Path(report["output_path"])
        assert report["exit_code"] == 0 and folder.parent == Path("out").absolute() and folder.is_dir()
        written = json.loads((folder / "eval_result.json").read_text())
        assert report["result"] == (written if task == "evaluate" else None)
    Path("boot.py").write_text("raise SystemExit(7)")
    assert main(["run", "evaluate", *GIVEN["evaluate"], "-q", "--json"]) == 7
    report = json.loads(capfd.readouterr().out)
    assert report["exit_code"] == 7 and report["result"] is None


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell):
    """As docs/tools.md says."""
    def asked(kind: str, words: str, number: str) -> str:
        given = {"_MINDPET_LITE_COMPLETE": f"{shell}_{kind}", "COMP_WORDS": words, "COMP_CWORD": number}
        return subprocess.run([sys.executable, "-m", "mindpet_lite"], env={**ENVIRONMENT, **given},
                              capture_output=True, text=True, timeout=60).stdout

    assert "_MINDPET_LITE_COMPLETE" in asked("source", "", "")
    # What is being completed is a number of a word, but for fish the word itself.
    found = asked("complete", "mindpet-lite me", "me" if shell == "fish" else "1")
    assert "merge" in found and "convert" not in found
    last = "mindpet-lite convert --to ko", "ko" if shell == "fish" else "3"
    assert "kohya" in asked("complete", *last) and "peft" not in asked("complete", *last)


def test_tasks_do_not_load_click():
    code = "import sys, mindpet_lite.tasks, mindpet_lite.cli; sys.exit('click' in sys.modules)"
    assert run(code=code).returncode == 0


def test_help_names_every_option_and_shows_an_example(capfd):
    assert main(["--help"]) == 0 and "run" in capfd.readouterr().out
    assert main(["run", "--help"]) == 0 and "mindpet-lite run finetune -dp" in capfd.readouterr().out
    for task, own, other in (("finetune", "-pm, --pretrained_model_path", "-cp"),
                             ("evaluate", "-cp, --ckpt_path", "-pm"), ("infer", "-cp, --ckpt_path", "-pm")):
        assert main(["run", task, "--help"]) == 0
        page = capfd.readouterr().out
        for option in ("-dp, --data_path", "-op, --output_path", "-bp, --boot_file_path", "-mc, --model_config_path",
                       "-t, --timeout", "-q, --quiet", "--strict", "--no-follow", own, f"mindpet-lite run {task} -dp"):
            assert option in page, (task, option)
        assert f"{other}," not in page


@pytest.mark.parametrize("page", ["tasks.md", "tasks_CN.md"])
def test_the_page_shows_what_the_commands_print(page, tmp_path):
    """Write the page's files, run its commands one after another, compare with the output it shows."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    files = r"^```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)^```"
    for name, body in re.findall(files, text, re.DOTALL | re.MULTILINE):
        (work / name).write_text(body, encoding="utf-8")
    consoles = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert consoles
    shell = f"mindpet-lite() {{ {sys.executable} -m mindpet_lite \"$@\"; }}\n"
    for console in consoles:
        for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE):
            done = subprocess.run(["bash", "-c", shell + command], cwd=work, env=ENVIRONMENT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
            printed = re.sub("MINDPET_[0-9A-F]{32}", "MINDPET_<ID>", done.stdout.replace(str(work), "/home/me"))
            assert printed == shown, command
