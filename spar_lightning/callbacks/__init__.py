"""Callbacks and loggers: mIoU, plots, checkpoints, metrics.jsonl, progress bars, graceful stop."""

from spar_lightning.callbacks.mean_iou import MeanIoU
from spar_lightning.callbacks.run_plots import RunPlots

__all__ = ["MeanIoU", "RunPlots"]
