"""Panoptic quality of segments whose masks are known and whose classes are predicted (mask oracle; paper, Table 8).

The segments are those of the ground truth. A predicted thing keeps its mask; predicted stuff of one class is one
segment per image. A predicted and a true segment of the same class match if their IoU is above 0.5. Per class: PQ = sum
of the IoUs of matches / (TP + FP / 2 + FN / 2), SQ = mean IoU of matches, RQ = TP / (TP + FP / 2 + FN / 2). Pixels that
are not counted are in no segment, so that the rules of panopticapi for void and crowd have no effect.

Shapes: S segments of an image, C classes.
"""

import torch
from torch import Tensor


class PanopticQuality:
    """Panoptic quality over images.

    Args:
        is_thing: Whether each class (C) has instances; the others are stuff.

    Attributes:
        images: Number of images.
    """

    def __init__(self, is_thing: Tensor) -> None:
        self.is_thing = is_thing
        self.iou = torch.zeros(len(is_thing), dtype=torch.float64)  # summed over matches
        self.matched = torch.zeros(len(is_thing), dtype=torch.long)
        self.true = torch.zeros_like(self.matched)
        self.predicted = torch.zeros_like(self.matched)
        self.images = 0

    def update(self, areas: Tensor, classes: Tensor, predicted: Tensor) -> None:
        """Add an image.

        Args:
            areas: Number of pixels of each segment (S).
            classes: True classes (S); a stuff class occurs at most once.
            predicted: Predicted classes (S).
        """
        count = len(self.is_thing)
        merged = torch.zeros(count, dtype=torch.long).index_add_(0, predicted, areas)  # (C)
        whole = torch.where(self.is_thing[predicted], areas, merged[predicted])  # area of the predicted segment
        iou = areas.double() / whole  # a true segment is part of the predicted one
        match = (predicted == classes) & (iou > 0.5)
        self.iou.index_add_(0, classes[match], iou[match])
        self.matched += classes[match].bincount(minlength=count)
        self.true += classes.bincount(minlength=count)
        found = predicted.bincount(minlength=count)
        self.predicted += torch.where(self.is_thing, found, found.clamp(max=1))
        self.images += 1

    def per_class(self) -> dict[str, Tensor]:
        """Return PQ, SQ and RQ of each class (C) in percent; NaN for a class that never occurs."""
        weight = (self.true + self.predicted).double() / 2  # TP + FP / 2 + FN / 2
        seen = torch.where(weight > 0, 0.0, torch.nan)
        quality = {"PQ": self.iou / weight, "RQ": self.matched / weight, "SQ": self.iou / self.matched}
        return {name: 100 * values.nan_to_num(0) + seen for name, values in quality.items()}

    def results(self) -> dict[str, float]:
        """Return the means of PQ, SQ and RQ in percent, over all classes, things and stuff that occur."""
        groups = {"": torch.ones_like(self.is_thing), " things": self.is_thing, " stuff": ~self.is_thing}
        quality = self.per_class()
        return {
            f"{name}{group}": quality[name][chosen].nanmean().item()
            for group, chosen in groups.items()
            for name in ("PQ", "SQ", "RQ")
        }
