"""Search in the images of an index, for the page of `spar demo`."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from PIL import Image

from spar_lightning.errors import UserError, nearest
from spar_lightning.feature_index import FeatureIndex, ranking
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

    Raises:
        UserError: The weights of the index cannot be loaded.
    """

    def __init__(self, index: FeatureIndex) -> None:
        self.index = index
        _ = index.student  # loaded now, so that an error is shown at the start, and not to visitors

    def __call__(self, classes: Mapping[str, tuple[str, ...]], label: str) -> Found:
        """Rank the images by the area of a class, and segment the best ones.

        Args:
            classes: Class names by label.
            label: Class to rank by; empty for the first one.

        Raises:
            UserError: `label` is not one of the classes, or the text encoder does not know a name.
        """
        wanted = list(classes)
        chosen = label.strip() or wanted[0]
        if chosen not in classes:
            hint = nearest(chosen, wanted)
            raise UserError(f"{chosen[:100]!r} is not one of the classes. {hint}Allowed: {', '.join(wanted)}.")
        start = time.perf_counter()
        classifier = self.index.classifier(classes)
        areas = list(self.index.areas(classifier))
        pictures = []
        for i in ranking(areas, wanted.index(chosen), SHOWN):
            preview = self.index.preview(i)
            labels = self.index.labels(i, classifier, size=(preview.shape[-2], preview.shape[-1]))
            picture = overlay(preview.permute(1, 2, 0).numpy(), labels.numpy(), wanted, palette(len(wanted)))
            pictures.append((self.index.names[i], areas[i][wanted.index(chosen)].item(), picture))
        return Found(pictures, len(areas), time.perf_counter() - start)
