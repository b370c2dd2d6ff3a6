"""Gallery of an evaluation: the best, the worst and random images of a benchmark, for its HTML report.

The images are segmented again after the evaluation, because the best and the worst are only known then.
"""

import base64
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.bootstrap import Counts, iou, mean_iou
from spar_lightning.image.resize import at_most, resize_labels
from spar_lightning.visualization.palette import palette

SIDE: Final = 320  # maximum long side of a picture in pixels
QUALITY: Final = 80  # of JPEG
LISTED: Final = 10  # classes in the legend of an image
ERRORS: Final = np.array([[235, 235, 235], [200, 30, 30], [0, 0, 0]], np.uint8)  # right, wrong, not counted

Groups = dict[str, list[int]]


def choose(counts: Counts, count: int, seed: int) -> Groups:
    """Return the indices of random, best and worst images; no image is in two groups.

    The random images depend on the benchmark only, so that they are the same for all networks.

    Args:
        counts: Correct, labeled and predicted pixels of each image (images, C, 3).
        count: Number of images in each group; fewer if the benchmark has fewer than three times as many.
        seed: Seed of the random choice.
    """
    miou = mean_iou(iou(counts))
    usable = np.flatnonzero(np.isfinite(miou))  # images with a counted pixel
    count = min(count, -(-len(usable) // 3))
    drawn = np.random.default_rng(seed).permutation(usable)[:count]
    others = np.setdiff1d(usable, drawn)
    order = others[np.argsort(-miou[others], kind="stable")]
    worst = order[count:][-count:][::-1] if count else order[:0]
    return {"best": order[:count].tolist(), "worst": worst.tolist(), "random": drawn.tolist()}


def pictures(
    benchmark: Benchmark,
    segmenter: Callable[[Tensor], Tensor],
    counts: Counts,
    groups: Groups,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]],
) -> list[dict[str, Any]]:
    """Segment the chosen images and return their pictures as plain data.

    Args:
        benchmark: Opened benchmark.
        segmenter: Segmenter, or another function from pixels to a segmentation map, on `device`.
        counts: Counts of all images (images, C, 3).
        groups: Indices of the images by group.
        device: Device of the network.
        precision: Function that returns the precision context of the network.
    """
    miou, found = mean_iou(iou(counts)), []
    indices = [(group, index) for group, chosen in groups.items() for index in chosen]
    for group, index in tqdm(indices, f"{benchmark.name}: pictures of report.html", unit="image", leave=False):
        image = benchmark[index]
        with precision():
            predicted = segmenter(image.image.to(device)).cpu()
        shown = at_most(image.image, SIDE)
        height, width = shown.shape[-2:]
        labels, predicted = (resize_labels(each, (height, width)) for each in (image.labels, predicted))
        drawn = {
            "image": _jpeg(shown),
            "labels": _png(labels.numpy(), len(benchmark.classes)),
            "prediction": _png(predicted.numpy(), len(benchmark.classes)),
            "errors": _errors(predicted, labels),
        }
        legend = _legend(counts[index], list(benchmark.classes))
        entry = {"group": group, "stem": image.key, "miou": float(miou[index]), "width": width, "height": height}
        found.append({**entry, "classes": legend, "pictures": drawn})
    return found


def _legend(counts: Counts, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return label, color and IoU of the largest classes in an image or its prediction."""
    colours, ious = palette(len(labels)), iou(counts)
    order = np.argsort(-counts[:, 1:].max(1), kind="stable")
    present = [c for c in order.tolist() if np.isfinite(ious[c])]
    return [
        {"label": labels[c], "color": "#{:02x}{:02x}{:02x}".format(*colours[c].tolist()), "iou": float(ious[c])}
        for c in present[:LISTED]
    ]


def _errors(predicted: Tensor, labels: Tensor) -> str:
    """Return a picture with wrong pixels in red and pixels that are not counted in black."""
    kinds = (predicted != labels).long()
    kinds[labels == IGNORED] = 2
    return _indexed(kinds.numpy().astype(np.uint8), ERRORS)


def _png(labels: NDArray[np.integer], classes: int) -> str:
    """Return the classes of a map as colors; ignored pixels are black."""
    colours = palette(classes)  # the last color is black
    present, indices = np.unique(labels, return_inverse=True)
    if len(present) > 256:
        return _uri(Image.fromarray(colours[labels]), "png")
    return _indexed(indices.reshape(labels.shape).astype(np.uint8), colours[present])


def _indexed(indices: NDArray[np.uint8], colours: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(indices)
    picture.putpalette(colours.tobytes())
    return _uri(picture, "png", optimize=True)


def _jpeg(image: Tensor) -> str:
    return _uri(Image.fromarray(image.permute(1, 2, 0).numpy()), "jpeg", quality=QUALITY)


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
    """Return a picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
