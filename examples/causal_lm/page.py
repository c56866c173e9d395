"""What a run leaves for people: the curve of its loss, and one HTML file with its figures, answers and settings."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import STYLE, inline, plain, table
from options import Settings

from mindpet_lite.formats.atomic import atomic_file


class Answered(NamedTuple):
    """A held-out prompt, the answer that its sample has, and the model's before and after."""

    prompt: str
    expected: str
    before: str
    after: str


def save_curve(losses: Sequence[float], path: Path) -> None:
    """Writes the loss of every step, and its moving average, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, so only where it is needed

    window = max(1, min(25, len(losses) // 4))
    average = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(range(window, len(losses) + 1), average, color="tab:blue", label=f"mean of {window} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("loss of a token of the answers")
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120)


def save_results(settings: Settings, measured: dict[str, Any], answers: Sequence[Answered]) -> None:
    """Writes results.json, answers.json and report.html."""
    out = settings.out
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in one) + "</tr>" for one in answers)
    head = "".join(f"<th>{name}</th>" for name in Answered._fields)
    shown = f"<h2>held-out prompts</h2><table><tr>{head}</tr>{rows}</table>" if answers else ""
    curve = f"<h2>loss</h2>{inline(out / 'loss.png')}" if (out / "loss.png").is_file() else ""
    text = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(out.name)}</title>'
            f"<style>{STYLE}th{{text-align:left}}td{{white-space:pre-wrap}}</style><h1>{html.escape(out.name)}</h1>"
            f"<h2>measured</h2>{table(measured)}{curve}{shown}<h2>settings</h2>{table(plain(settings))}</html>\n")
    write(out / "report.html", text)
    write(out / "answers.json", as_json([one._asdict() for one in answers]))
    write(out / "results.json", as_json(measured))


def as_json(value: Any) -> str:
    """JSON for people."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    with atomic_file(path) as file:
        file.write_text(text, encoding="utf-8")
