"""A run's numbers in its folder: a CSV file, and TensorBoard's where that is installed."""

import csv
import io
import os
from pathlib import Path

import numpy as np

FIELDS = {
    "step": "updates done",
    "seconds": "of training, over all sittings",
    "loss": "of the batch",
    "grad_norm": "before clipping",
    "learning_rate": "of the update",
    "images_per_second": "since the last row",
    "memory_gib": "the most that the device held",
    "fixed_loss": "of the averaged weights, on fixed images and noises",
    "fixed_bits_per_dim": "the bound of the averaged weights on those images, estimated",
}


class Log:
    """Rows of FIELDS, appended to `log.csv`; a resumed run drops the rows after its checkpoint."""

    def __init__(self, folder: Path, step: int):
        self.path, part = folder / "log.csv", folder / "log.csv.part"
        rows = rows_until(self.path, step) if self.path.exists() else []
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, self.path)  # all or nothing: a full disk leaves the rows that there were
        self.board = tensorboard(folder, step)

    def write(self, step: int, **values: float) -> None:
        """One row; a field that is not given stays empty."""
        row = {"step": step} | {k: f"{v:.6g}" for k, v in values.items()}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(row)
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, png: bytes) -> None:
        """A grid of samples, for TensorBoard."""
        if self.board:
            from PIL import Image

            pixels = np.array(Image.open(io.BytesIO(png)).convert("RGB"))
            self.board.add_image("samples", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is still on its way."""
        if self.board:
            self.board.close()


def rows_until(path: Path, step: int) -> list[dict]:
    """The whole rows of a log up to `step`; ValueError where it is not the log of a run."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            known = {*(reader.fieldnames or ())} <= {*FIELDS}
            rows = [row for row in reader if is_before(row, step)]
    except (UnicodeDecodeError, csv.Error):
        known = False
    if not known:
        raise ValueError(f"{path} is not the log of a run: move it away, or choose another --out")
    return rows


def is_before(row: dict, step: int) -> bool:
    """Whether a row of the file is whole and of an update up to `step`."""
    whole = None not in row.values() and (row.get("step") or "").isdigit()
    return whole and int(row["step"]) <= step


def tensorboard(folder: Path, step: int):
    """TensorBoard's writer, without the events after `step`; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
