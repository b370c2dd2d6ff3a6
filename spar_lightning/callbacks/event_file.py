"""TensorBoard logger of a run. It writes in the main thread, so that a full disk is an error of the run.

The writer of TensorBoard has a thread of its own, which prints a traceback for each error and raises it again later.
"""

import io
import os
import socket
import time
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard import FileWriter, SummaryWriter

from spar_lightning.files.atomic import naming


class Events(TensorBoardLogger):
    """TensorBoard logger that writes no settings, because config.yaml contains them.

    Args:
        root: Run folder.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """Writer of the event file, which is created when the first event is written."""
        if self._experiment is None:
            self._experiment = _Writer(self.root_dir)
        return self._experiment

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def save(self) -> None:
        """Write pending events to disk."""
        self.experiment.flush()


class EventFile:
    """Event file in a folder. Events are kept in memory until `flush`, which raises OSError if the disk is full.

    Args:
        folder: Existing folder.
    """

    def __init__(self, folder: str) -> None:
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self.path = Path(folder) / name
        self._pending = io.BytesIO()
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        """Return the folder."""
        return str(self.path.parent)

    def add_event(self, event: Event) -> None:
        """Add an event."""
        RecordWriter(self._pending).write(event.SerializeToString())

    def flush(self) -> None:
        """Append pending events to the file; if that fails, they are lost, so that the run can end."""
        content, self._pending = self._pending.getvalue(), io.BytesIO()
        if content:
            with naming(self.path), open(self.path, "ab") as file:
                file.write(content)

    def close(self) -> None:
        """Write pending events."""
        self.flush()


class _FileWriter(FileWriter):
    """Writer of summaries to an `EventFile`."""

    def __init__(self, folder: str) -> None:
        self.event_writer = EventFile(folder)


class _Writer(SummaryWriter):
    """SummaryWriter that writes to an `EventFile`."""

    def _get_file_writer(self) -> Any:
        writers: dict[str, FileWriter] = self.all_writers or {self.log_dir: _FileWriter(self.log_dir)}
        self.all_writers: Any = writers
        self.file_writer: Any = writers[self.log_dir]
        return self.file_writer
