"""The report of a run: one HTML file that shows its pictures, its curve, its figures and its settings."""

import base64
import html
from pathlib import Path
from typing import Any

STYLE = ("body{font:16px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}img{max-width:100%}"
         "table{border-collapse:collapse}td{padding:.1em 1em .1em 0;vertical-align:top}")


def write_report(out: Path, settings: dict[str, Any], measured: dict[str, Any]) -> None:
    """Writes report.html into the folder of a run; pictures are those that stand there, inside the file.

    Args:
        out: The folder.
        settings: As used.
        measured: Figures by name.
    """
    pictures = [path for name in ("grid.png", "loss.png") if (path := out / name).is_file()]
    pictures += sorted((out / "validation").glob("*.png"))
    body = "".join(f"<h2>{html.escape(path.stem)}</h2>{inline(path)}" for path in pictures)
    text = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(out.name)}</title>'
            f"<style>{STYLE}</style><h1>{html.escape(out.name)}</h1><h2>measured</h2>{table(measured)}{body}"
            f"<h2>settings</h2>{table(settings)}</html>\n")
    (out / "report.html").write_text(text, encoding="utf-8")


def inline(path: Path) -> str:
    """An image tag that holds the picture itself."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def table(values: dict[str, Any]) -> str:
    """Names and values in two columns."""
    rows = (f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(shown(value))}</td></tr>"
            for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def shown(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
