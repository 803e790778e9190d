"""The log: rows that a reader can trust after any number of interruptions."""

import csv

import numpy as np
import pytest

from minddpm.log import FIELDS, Log, is_before
from minddpm.viz import png


def rows(folder):
    with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_have_every_field_and_what_is_not_given_is_empty(tmp_path):
    log = Log(tmp_path, 0)
    log.write(20, loss=0.5, seconds=1.25)
    log.write(40, loss=0.25, fixed_loss=1 / 3)
    log.close()
    first, second = rows(tmp_path)
    assert list(first) == list(FIELDS)
    assert first == dict.fromkeys(FIELDS, "") | {"step": "20", "loss": "0.5", "seconds": "1.25"}
    assert (second["step"], second["fixed_loss"]) == ("40", "0.333333")


def test_a_resumed_log_goes_on_after_its_checkpoint(tmp_path):
    log = Log(tmp_path, 0)
    for step in (20, 40, 60):
        log.write(step, loss=step)
    log.close()
    with (tmp_path / "log.csv").open("a") as file:
        file.write("8")  # the process died in the midst of a row
    log = Log(tmp_path, 40)
    log.write(60, loss=-1)
    log.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        ("20", "20"),
        ("40", "40"),
        ("60", "-1"),
    ]


@pytest.mark.parametrize("text", [b"a;b\n1;2\n", "step".encode("utf-16"), b"x" * 200_000])
def test_a_file_that_is_not_ours_is_kept(tmp_path, text):
    (tmp_path / "log.csv").write_bytes(text)
    with pytest.raises(ValueError, match=r"log\.csv is not the log of a run: move it away"):
        Log(tmp_path, 0)
    assert (tmp_path / "log.csv").read_bytes() == text


def test_a_full_disk_leaves_the_rows_that_there_were(tmp_path, monkeypatch):
    log = Log(tmp_path, 0)
    log.write(20, loss=0.5)
    log.close()
    before = (tmp_path / "log.csv").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("csv.DictWriter.writerows", full)
    with pytest.raises(OSError, match="No space left"):
        Log(tmp_path, 20)
    assert (tmp_path / "log.csv").read_bytes() == before


def test_broken_rows_are_not_kept():
    assert is_before({"step": "7"}, 7)
    assert not any(is_before(row, 7) for row in ({"step": "8"}, {"step": ""}, {"step": None}, {}))


def test_tensorboard_holds_the_numbers_and_the_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, 0)
    log.write(20, loss=0.5)
    log.picture(20, png(np.full((8, 16, 3), 200, np.uint8)))
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(20, 0.5)]
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (20, 16, 8)


def test_without_tensorboard_the_csv_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    log = Log(tmp_path, 0)
    log.write(1, loss=2.0)
    log.picture(1, b"")
    log.close()
    assert [f.name for f in tmp_path.iterdir()] == ["log.csv"]
    assert rows(tmp_path)[0]["loss"] == "2"
