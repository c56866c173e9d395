"""Every Python block of README and guides runs, top to bottom of its page."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What both languages show runs once.
PAGES = ["README.md", "docs/guide.md", "docs/mindpet.md", "docs/quantised.md", "docs/training.md", "docs/methods.md",
         "docs/adapters.md", "docs/distributed.md", "docs/quickstart.md", "docs/graph.md", "docs/migrating.md"]


def blocks_of(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def write_files(page: str, folder: Path) -> None:
    """Write the YAML blocks whose first line is a comment with a file's name, for the Python blocks to read."""
    for block in blocks_of(page, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)
        if name:
            (folder / name[1]).write_text(block, encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path):
    blocks = blocks_of(page, "python")
    assert blocks
    write_files(page, tmp_path)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# Runs each script that it is given by itself, in a folder of its own.
ALONE = """
import os, runpy, sys
for script in sys.argv[1:]:
    print(script, flush=True)
    print(script, file=sys.stderr, flush=True)
    os.chdir(os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
"""
SUBJECTS = ["guide", "methods", "adapters", "training", "formats", "tools", "mindpet", "tasks", "ascend",
            "distributed", "quickstart", "graph", "migrating", "quantised"]


def test_the_first_program_of_each_page_and_each_of_the_readmes_runs_alone(tmp_path):
    programs = {f"{page}-{number}": block for page in ("README.md", "README_CN.md")
                for number, block in enumerate(blocks_of(page, "python"))}
    programs |= {page: blocks_of(f"docs/{page}.md", "python")[0]
                 for subject in SUBJECTS for page in (subject, f"{subject}_CN")}
    scripts = []
    for name, block in programs.items():
        (tmp_path / name).mkdir()
        scripts.append(tmp_path / name / "program.py")
        scripts[-1].write_text(block, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", ALONE, *map(str, scripts)], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (done.stdout.index(f"{script}\n") for script in scripts[:2])
    block = blocks_of("README.md", "python")[0]
    assert re.search(r"# (trainable params: .*)", block)[1] in done.stdout[first:second], "README prints its figures"


def test_links_between_pages_lead_somewhere():
    link = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target, anchor in link.findall(path.read_text(encoding="utf-8")):
            other = (path.parent / target).resolve() if target else path
            assert other.exists(), f"{path.name} links to {target}, which is not there"
            if anchor:
                assert anchor in anchors_of(other), f"{path.name} links to {target}#{anchor}, which is not there"


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Pages about the code itself are English alone.
ENGLISH = {"architecture.md"}


def outline(page: Path) -> tuple[list[int], list[tuple[str, str]]]:
    """Return the levels of a page's headings, and its blocks of code without their comments."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return ([len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)],
            [(language, re.sub(r" *#(?! \S+\.yaml$).*", "", code, flags=re.MULTILINE)) for language, code in blocks])


@pytest.mark.parametrize("page", [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
                                  if path.name not in ENGLISH and not path.stem.endswith("_CN")],
                         ids=lambda path: path.stem)
def test_both_languages_have_the_same_headings_and_code(page):
    assert outline(page.with_name(f"{page.stem}_CN.md")) == outline(page)
