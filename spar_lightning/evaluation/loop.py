"""The loop over the images of a benchmark: segment, count, take the time.

Everything that measures mIoU outside the Trainer's own validation runs through here.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from spar_lightning.datamodules.sample import LabelledImage
from spar_lightning.evaluation.score import Score
from spar_lightning.evaluation.timing import now
from spar_lightning.segmenter import Segmenter


def count(
    segmenter: Segmenter,
    images: Iterable[LabelledImage],
    score: Score,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]],
) -> Iterator[float]:
    """Add every image to the score and yield the milliseconds that its segmentation took.

    Args:
        segmenter: Its backbone lies on the device.
        images: Of a benchmark.
        score: What is counted.
        device: Where the network runs.
        precision: Context of the network's arithmetic, such as autocast.
    """
    for image in images:
        pixels = image.image.to(device)
        start = now(device)
        with precision():
            predicted = segmenter(pixels)
        milliseconds = 1000 * (now(device) - start)
        score.update(predicted, image.labels.to(device))
        yield milliseconds
