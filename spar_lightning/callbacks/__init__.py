"""What happens around training: mIoU, pictures, metrics.jsonl, progress bars, a clean stop."""

from spar_lightning.callbacks.mean_iou import MeanIoU
from spar_lightning.callbacks.pictures import Pictures

__all__ = ["MeanIoU", "Pictures"]
