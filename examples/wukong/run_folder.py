"""The folder of a run: what may be in it before, the settings as used, the log, TensorBoard."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from errors import UserError
from settings import Settings

CHECKPOINTS, LOG, SETTINGS = "checkpoints", "log.jsonl", "settings.yaml"
# Of this example and of causal_lm, which shares this file.
WRITTEN = ("adapter", "text_encoder_adapter", "ema", CHECKPOINTS, "class_images", "validation", "tensorboard", LOG,
           SETTINGS, "loss.png", "grid.png", "results.json", "report.html", "answers.json")
# What may change when a run goes on: where it stands, how often it writes, where it computes.
MAY_CHANGE = {"out", "resume", "overwrite", "save_every", "keep", "validation_every", "latent_cache", "base", "data",
              "heldout", "heldout_draws", "model", "device", "mode"}


def check(settings: Settings) -> None:
    """Refuses a folder that holds something, unless it may go or is to be gone on from.

    Raises:
        UserError: With what to do.
    """
    out = settings.out
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a folder")
    if settings.resume and settings.overwrite:
        raise UserError("--resume keeps what is in the folder and --overwrite deletes it: give one of them")
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if settings.resume or not found:
        return
    if not settings.overwrite:
        raise UserError(f"{out} holds {found[0]} already: give --resume to go on, --overwrite to delete what a run "
                        "left there, or another --out")
    others = [name for name in found if name not in WRITTEN]
    if others:
        raise UserError(f"--overwrite deletes what a run leaves, and {out} holds {others[0]}, which is none of it: "
                        "give another --out")


def clear(out: Path) -> None:
    """Deletes what a run leaves in its folder."""
    for path in (out / name for name in WRITTEN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def lasting(settings: Settings) -> dict[str, Any]:
    """The settings that must not change when a run goes on."""
    return {name: value for name, value in plain(settings).items() if name not in MAY_CHANGE}


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as YAML and JSON hold them; those that are not set, or hold nothing, are left out."""
    values = dataclasses.asdict(settings)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()
            if value not in (None, [])}


class Log:
    """The log of a run: a JSON object for each step in log.jsonl, and TensorBoard's files where that is installed.

    Args:
        out: The folder of the run.
        step: The number of steps that are done; what the log says of later ones is dropped, they are done again.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / LOG
        before = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows = [row for row in map(json.loads, before) if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8")
        self.board = board(out / "tensorboard")

    def add(self, **row: Any) -> None:
        """Adds a row."""
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Closes the files."""
        self.file.close()
        if self.board is not None:
            self.board.close()

    def losses(self, last: int = 0) -> list[float]:
        """The loss of every step so far, or of the last ones."""
        return [row["loss"] for row in self.rows[-last:]]


def board(folder: Path) -> Any:
    """A writer of TensorBoard's files, or None where tensorboardX is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        return None
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder))


def save_settings(settings: Settings) -> None:
    """Writes the settings as used, which --config reads."""
    values = {name: value for name, value in plain(settings).items() if name not in ("resume", "overwrite")}
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=110)
    (settings.out / SETTINGS).write_text(text, encoding="utf-8")
