"""The table and the plot of a comparison, from its runs."""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from method_table import CHOICES

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LANGUAGES = {"en": "English film reviews", "zh": "Chinese shop reviews"}
COLUMNS = ("method", "accuracy", "seeds", "trained share", "trained numbers", "file", "step", "memory")
# Where a label may stand beside its point, in points of the page: near first.
PLACES = [(distance * x, distance * y) for distance in (7, 14, 22, 32, 44, 58, 74, 92)
          for x, y in ((1, 0.3), (-1, 0.3), (0.5, 1), (-0.5, 1), (0.5, -1), (-0.5, -1), (1, -0.6), (-1, -0.6))]


def rows_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method, the most accurate first.

    The spread is the standard deviation over the seeds (n - 1); time and memory are medians.
    """
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        found = [run["accuracy"] for run in own]
        seconds, peaks = ([run[name] for run in own if run[name]] for name in ("step_seconds", "peak_bytes"))
        rows.append({
            "method": method, "title": CHOICES[method].title, "accuracy": statistics.fmean(found),
            "spread": statistics.stdev(found) if len(found) > 1 else None, "accuracies": found,
            "share": own[0]["trained"] / own[0]["total"], "trained": own[0]["trained"],
            "file_bytes": own[0]["file_bytes"], "step_seconds": statistics.median(seconds) if seconds else None,
            "peak_bytes": statistics.median(peaks) if peaks else None, "rate": own[0]["rate"]})
    return sorted(rows, key=lambda row: -row["accuracy"])


def line(row: dict[str, Any]) -> str:
    """A row of the table in Markdown."""
    spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
    seconds, peak = row["step_seconds"], row["peak_bytes"]
    step = "" if seconds is None else f"{1000 * seconds:.0f} ms{' (forward)' if row['method'] == 'frozen' else ''}"
    cells = (row["title"], f"{row['accuracy']:.3f}{spread}", len(row["accuracies"]), f"{100 * row['share']:.3f}%",
             f"{row['trained']:,}", f"{row['file_bytes'] / 1000:,.0f} kB", step,
             "" if peak is None else f"{peak / 1e6:,.0f} MB")
    return f"| {' | '.join(map(str, cells))} |"


def write_tables(runs: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Writes table.md and table.json; returns the rows."""
    rows = rows_of(runs)
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    (out / "table.md").write_text(head + "".join(line(row) + "\n" for row in rows), encoding="utf-8")
    (out / "table.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return rows


def write_plot(rows: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    """Draws accuracy against trained share, with the spread as a bar and the name beside each point."""
    figure, axes = plt.subplots(figsize=(11, 7), dpi=110)
    axes.set_xscale("log")
    x, y = [100 * row["share"] for row in rows], [row["accuracy"] for row in rows]
    axes.errorbar(x, y, [row["spread"] or 0 for row in rows], fmt="o", markersize=5, color="#1f5fa8", ecolor="#a9c4e4",
                  elinewidth=1.5, zorder=3)
    frozen = next((row["accuracy"] for row in rows if row["method"] == "frozen"), None)
    if frozen is not None:
        axes.axhline(frozen, color="#999999", linewidth=1, linestyle="--", zorder=1)
    axes.margins(0.12, 0.12)
    axes.set_xlabel("numbers that train, % of all (log)")
    axes.set_ylabel(f"accuracy on {run['test_count']:,} test sentences")
    axes.set_title(f"all-MiniLM-L6-v2, {LANGUAGES[run['lang']]}, {run['train_count']:,} sentences, "
                   f"epochs: {run['epochs']}; bars: standard deviation over seeds", fontsize=10)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    label_points(figure, axes, list(zip(x, y)), [row["title"] for row in rows])
    figure.savefig(path)
    plt.close(figure)


def label_points(figure: Any, axes: Any, points: list[tuple[float, float]], names: list[str]) -> None:
    """Writes each name where it covers no point and no other name, as near as can be; a thin line leads to it."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    pixels = axes.transData.transform(np.array(points))
    taken, frame = [(px - 6, py - 6, px + 6, py + 6) for px, py in pixels], axes.bbox
    for point, name in zip(points, names):
        for dx, dy in PLACES:
            text = axes.annotate(name, point, (dx, dy), textcoords="offset points", fontsize=8.5, zorder=4,
                                 ha="left" if dx > 0 else "right", va="bottom" if dy > 0 else "top",
                                 arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "shrinkB": 3})
            # An annotation's own extent has its line to the point in it: what counts is the text alone.
            box = matplotlib.text.Text.get_window_extent(text, renderer)
            mine = (box.x0 - 2, box.y0 - 1, box.x1 + 2, box.y1 + 1)
            inside = frame.x0 < mine[0] and mine[2] < frame.x1 and frame.y0 < mine[1] and mine[3] < frame.y1
            if inside and not any(overlap(mine, other) for other in taken):
                taken.append(mine)
                break
            text.remove()
        else:
            axes.annotate(name, point, (4, 4), textcoords="offset points", fontsize=8.5)


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes (left, bottom, right, top) have a part in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
