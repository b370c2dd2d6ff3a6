"""Tests of the TensorBoard logger of a run: readable events, and one error without a traceback if the disk is full."""

import errno
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from spar_lightning.callbacks.event_file import EventFile, Events
from spar_lightning.callbacks.jsonl_logger import JSONLLogger

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


def test_events_can_be_read(tmp_path: Path) -> None:
    logger = Events(str(tmp_path))
    assert not list(tmp_path.iterdir())
    for step in range(3):
        logger.log_metrics({"loss": step / 2}, step)
        logger.save()
    logger.experiment.add_text("results", "| a |", 3)
    logger.experiment.add_image("plots/x", np.zeros((3, 4, 4), np.uint8), 3)
    logger.finalize("success")
    logger.finalize("success")
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("events.out.tfevents.")
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert found.Tags()["images"] == ["plots/x"] and found.Tags()["tensors"] == ["results/text_summary"]


def test_a_folder_with_a_variable_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "$HOME").mkdir()
    Events(str(tmp_path / "$HOME")).save()
    assert len(list((tmp_path / "$HOME").iterdir())) == 1


def test_two_files_in_one_folder(tmp_path: Path) -> None:
    for _ in range(2):
        EventFile(str(tmp_path)).close()
    assert len(list(tmp_path.iterdir())) == 2


@needs_full
def test_events_on_a_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = Events(str(tmp_path))
    path = logger.experiment.file_writer.event_writer.path
    path.symlink_to(FULL)
    for step in range(100):
        logger.log_metrics({"loss": 1.0}, step)
    with pytest.raises(OSError, match="events") as error:
        logger.save()
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(path)
    logger.finalize("failed")  # Lightning calls this after the error
    assert capfd.readouterr().err == ""


@needs_full
def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    logger = JSONLLogger(str(tmp_path))
    logger._opened = True
    logger.path.symlink_to(FULL)
    with pytest.raises(OSError) as error:
        logger.log_metrics({"loss": 1.0}, 0)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(logger.path)
