"""train.log: the messages of a run."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Also write the log messages of Lightning and this package, and Python's warnings, to a file."""
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "spar_lightning", "py.warnings")]
    level = loggers[1].level
    loggers[1].setLevel(logging.INFO)
    logging.captureWarnings(True)
    screen = logging.StreamHandler()  # captured warnings are otherwise not shown on the screen
    loggers[2].addHandler(screen)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        loggers[2].removeHandler(screen)
        logging.captureWarnings(False)
        loggers[1].setLevel(level)
        with suppress(OSError):  # reported by `handler`
            handler.close()


class _LogFile(logging.FileHandler):
    """Handler that reports on one line, and only once, that the file cannot be written."""

    _reported = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - name of logging
        """Report the error that is being handled."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._reported:
            self._reported = True
            print(f"{self.baseFilename}: {error.strerror}. Messages are missing there. Free space.", file=sys.stderr)
