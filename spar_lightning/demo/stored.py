"""Search in the images of an index, for the page of `spar demo`."""

import time
from dataclasses import dataclass
from typing import Final

from PIL import Image

from spar_lightning.errors import UserError, nearest
from spar_lightning.feature_index import FeatureIndex, ranking
from spar_lightning.segmentation.prompts import parse_classes
from spar_lightning.visualization.overlay import overlay
from spar_lightning.visualization.palette import palette

SHOWN: Final = 12  # images


@dataclass(frozen=True)
class Found:
    """Result of a search: name, area (fraction) and picture of the best images, number of images, and seconds."""

    best: list[tuple[str, float, Image.Image]]
    images: int
    seconds: float


class StoredImages:
    """Images of an index.

    Args:
        index: The index.
    """

    def __init__(self, index: FeatureIndex) -> None:
        self.index = index

    def __call__(self, classes: str, label: str) -> Found:
        """Rank the images by the area of a class, and segment the best ones.

        Args:
            classes: Class names, as for `spar query --classes`.
            label: Class to rank by; empty for the first one.

        Raises:
            UserError: The classes are malformed, or `label` is not one of them.
        """
        wanted = list(parsed := parse_classes(classes))
        chosen = label.strip() or wanted[0]
        if chosen not in parsed:
            raise UserError(
                f"{chosen!r} is not one of the classes. {nearest(chosen, wanted)}Allowed: {', '.join(wanted)}."
            )
        start = time.perf_counter()
        classifier = self.index.classifier(parsed)
        areas = list(self.index.areas(classifier))
        best = ranking(areas, wanted.index(chosen), SHOWN)
        pictures = []
        for i in best:
            preview = self.index.preview(i)
            size = (preview.shape[-2], preview.shape[-1])
            labels = self.index.labels(i, classifier, size=size)
            picture = overlay(preview.permute(1, 2, 0).numpy(), labels.numpy(), wanted, palette(len(wanted)))
            pictures.append((self.index.names[i], areas[i][wanted.index(chosen)].item(), picture))
        return Found(pictures, len(areas), time.perf_counter() - start)
