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
# Left, bottom, right, top.
Box = tuple[float, float, float, float]
# Where a label may stand beside its point, in points of the page: near first.
PLACES = [(distance * x, distance * y) for distance in (8, 14, 22, 32, 44, 58, 74, 92)
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
    step = "" if seconds is None else f"{1000 * seconds:.0f} ms"
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


def write_plot(rows: list[dict[str, Any]], run: dict[str, Any], path: Path) -> list[Box]:
    """Draws accuracy against trained share, with the spread as a bar and the name beside each point.

    Returns:
        Where the names stand, in pixels.
    """
    figure, axes = plt.subplots(figsize=(11, 7), dpi=110)
    axes.set_xscale("log")
    x, y = [100 * row["share"] for row in rows], [row["accuracy"] for row in rows]
    axes.errorbar(x, y, [row["spread"] or 0 for row in rows], fmt="o", markersize=5, color="#1f5fa8", ecolor="#a9c4e4",
                  elinewidth=1.5, zorder=3)
    frozen = next((row["accuracy"] for row in rows if row["method"] == "frozen"), None)
    if frozen is not None:
        axes.axhline(frozen, color="#999999", linewidth=1, linestyle="--", zorder=1)
    axes.set_xlim(min(x) / 4, max(x) * 4)
    axes.margins(y=0.12)
    axes.set_xlabel("numbers that train, % of all (log)")
    axes.set_ylabel(f"accuracy on {run['test_count']:,} test sentences")
    axes.set_title(f"all-MiniLM-L6-v2, {LANGUAGES[run['lang']]}, {run['train_count']:,} sentences, "
                   f"epochs: {run['epochs']}; bars: standard deviation over seeds", fontsize=10)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    boxes = label_points(figure, axes, list(zip(x, y)), [row["title"] for row in rows], frozen)
    figure.savefig(path)
    plt.close(figure)
    return boxes


def label_points(figure: Any, axes: Any, points: list[tuple[float, float]], names: list[str], line: float | None
                 ) -> list[Box]:
    """Writes each name where it covers no point, no other name and no line, as near as can be, and leads a line to it.

    Returns:
        Where the names stand.
    """
    figure.canvas.draw()
    renderer, dots = figure.canvas.get_renderer(), figure.dpi / 72
    pixels = axes.transData.transform(np.array(points))
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    if line is not None:
        height = axes.transData.transform((points[0][0], line))[1]
        taken.append((axes.bbox.x0, height - 1, axes.bbox.x1, height + 1))
    for point, pixel, name in zip(points, pixels, names):
        text = axes.annotate(name, point, PLACES[0], textcoords="offset points", fontsize=8.5, zorder=4, va="center",
                             arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 0})
        width, height, _ = renderer.get_text_width_height_descent(name, text.get_fontproperties(), False)
        free = (place for place in PLACES if fits(box_of(pixel, place, width, height, dots), taken, axes.bbox))
        place = next(free, PLACES[0])
        taken.append(box_of(pixel, place, width, height, dots))
        text.set_position(place)
        text.set_horizontalalignment("left" if place[0] > 0 else "right")
    return taken[-len(names):]


def box_of(pixel: Any, place: tuple[float, float], width: float, height: float, dots: float) -> Box:
    """Where a name at a place beside a point would stand, with a margin: left, bottom, right, top in pixels."""
    x, y = pixel[0] + place[0] * dots, pixel[1] + place[1] * dots
    left = x if place[0] > 0 else x - width
    return left - 3, y - height / 2 - 3, left + width + 3, y + height / 2 + 3


def fits(box: Box, taken: list[Box], frame: Any) -> bool:
    """Whether a box is inside the frame and covers nothing."""
    inside = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1
    return inside and not any(overlap(box, other) for other in taken)


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes (left, bottom, right, top) have a part in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
