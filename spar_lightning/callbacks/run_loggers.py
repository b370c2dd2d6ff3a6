"""Loggers of a run: their files in the run folder; settings, pictures and tables for W&B, MLflow and TensorBoard.

A logger of another class gets settings and scalars. wandb and mlflow are imported only if a run uses their logger.
"""

import inspect
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from spar_lightning.distributed import is_first_process
from spar_lightning.errors import UserError
from spar_lightning.formatting import markdown

Cell = str | float | None


def create_logger(root: Path, cls: type[Logger], **arguments: Any) -> Logger:
    """Create a W&B or MLflow logger whose files are in the run folder, unless its arguments name another place.

    Args:
        root: Run folder.
        cls: Class of the logger.
        arguments: Arguments of the class; a default counts as not given.

    Raises:
        UserError: If a package is missing.
    """
    if not is_first_process():
        return DummyLogger()  # only rank 0 logs; MLFlowLogger opens its database in the constructor
    placed = arguments.get("save_dir") != inspect.signature(cls).parameters["save_dir"].default
    if issubclass(cls, WandbLogger):
        _check_packages("wandb", cls, "wandb")
        if not placed:
            arguments["save_dir"] = arguments.get("dir") or str(root)
    elif placed or arguments.get("tracking_uri"):  # its default is the environment variable MLFLOW_TRACKING_URI
        _check_packages("mlflow", cls, "mlflow")
    else:  # a database, because MLflow 3.17 rejects a folder of files
        _check_packages("mlflow", cls, "mlflow", "sqlalchemy", "alembic")
        arguments["tracking_uri"] = f"sqlite:///{root / 'mlflow.db'}"
        arguments["artifact_location"] = arguments.get("artifact_location") or str(root / "mlartifacts")
    return cls(**arguments)


def _check_packages(extra: str, cls: type[Logger], *packages: str) -> None:
    if missing := [package for package in packages if find_spec(package) is None]:
        raise UserError(
            f"trainer.logger: {cls.__name__} needs the package {' and '.join(missing)}, which is not installed. "
            f'Run: pip install "spar-lightning[{extra}]"'
        )


@rank_zero_only
def log_settings(loggers: Sequence[Logger], settings: dict[str, Any]) -> None:
    """Log the settings of a run as hyperparameters; call it once per start."""
    for logger in loggers:
        if isinstance(logger, MLFlowLogger) and logger.experiment.get_run(logger.run_id).data.params:
            continue  # MLflow rejects other values; a run that is continued by its id keeps its first settings
        logger.log_hyperparams(settings)


@rank_zero_only
def log_picture(loggers: Sequence[Logger], path: Path, step: int) -> None:
    """Log an image file.

    Args:
        loggers: Loggers of the run.
        path: Image file in the folder plots/; its name without suffix is the name of the picture.
        step: Global step.
    """
    name = f"plots/{path.stem}"
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), "plots")
        elif isinstance(logger, TensorBoardLogger):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")


@rank_zero_only
def log_table(
    loggers: Sequence[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
) -> None:
    """Log a table: as data in W&B, as Markdown in MLflow and TensorBoard.

    Args:
        loggers: Loggers of the run.
        name: Name of the table.
        columns: Titles of the columns.
        rows: One sequence of cells per row; None is an empty cell.
        step: Global step.
    """
    text = markdown([columns, *([_cell(value) for value in row] for row in rows)])
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, list(columns), [list(row) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text + "\n", f"{name}.md")
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, step)


def _cell(value: Cell) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
