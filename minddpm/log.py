"""A run's numbers in its folder: a CSV file, and TensorBoard's where that is installed."""

import csv
import io
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
        self.path = folder / "log.csv"
        rows = []
        if self.path.exists():
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if is_before(row, step)]
        with self.path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
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
