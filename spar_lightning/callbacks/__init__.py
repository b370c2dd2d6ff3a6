"""Callbacks and loggers of a run: mIoU, plots, checkpoints, metrics.jsonl, progress bars, a graceful stop."""

from spar_lightning.callbacks.mean_iou import MeanIoU
from spar_lightning.callbacks.run_plots import RunPlots

__all__ = ["MeanIoU", "RunPlots"]
