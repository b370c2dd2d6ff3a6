"""Memory bank of patches: features with the classes of their pixels, and exact search for the nearest ones.

The search computes all similarities, a block of the bank at a time, so that its memory does not depend on the size of
the bank. docs/performance.md compares it with faiss, which needs twice the memory or takes longer.

Shapes: M patches in the bank, D channels, C classes, N queries.
"""

from collections.abc import Iterator
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.image.resize import resize_labels

BLOCK: Final = 4096  # patches of the bank that are compared at once
QUERIES: Final = 2048  # patches of an image that are compared at once


class MemoryBank:
    """Patches of training images.

    Args:
        capacity: Maximum number of patches.
        width: Number of channels D.
        classes: Number of classes C.
        device: Device of the features.

    Attributes:
        patches: Number of patches M in the bank.
        classes: Number of classes C.
    """

    def __init__(self, capacity: int, width: int, classes: int, device: torch.device | str = "cpu") -> None:
        self._features = torch.empty(capacity, width, dtype=torch.float16, device=device)
        self._counts = torch.empty(capacity, classes, dtype=torch.int16, device=device)
        self.patches, self.classes = 0, classes

    @staticmethod
    def bytes_of(capacity: int, width: int, classes: int) -> int:
        """Return the size of a bank in bytes."""
        return 2 * capacity * (width + classes)

    def add(self, features: Tensor, counts: Tensor) -> None:
        """Add patches; their features are normalized and stored in fp16.

        Args:
            features: (N, D).
            counts: Number of pixels of each class in each patch (N, C); at least one pixel per patch.
        """
        stop = self.patches + len(features)
        assert stop <= len(self._features)
        self._features[self.patches : stop] = F.normalize(features.float(), dim=-1)
        self._counts[self.patches : stop] = counts
        self.patches = stop

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the cosine similarities (N, k) of the k nearest patches, largest first, and their indices (N, k).

        Args:
            queries: Features (N, D), of any length.
            k: Number of neighbors, at most M.
        """
        with torch.autocast(queries.device.type, enabled=False):
            found = [self._nearest(part, k) for part in F.normalize(queries.float(), dim=-1).split(QUERIES)]
        similarities, indices = zip(*found, strict=True)
        return torch.cat(similarities), torch.cat(indices)

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = queries.new_full((len(queries), 0), -torch.inf)
        indices = torch.zeros_like(best, dtype=torch.long)
        for start, block in self._blocks():
            keys = block.to(queries.device).to(queries.dtype)  # in this order: half of the bytes are copied
            similarities, places = (queries @ keys.T).topk(min(k, len(block)))
            similarities = torch.cat([best, similarities], dim=1)
            places = torch.cat([indices, places + start], dim=1)
            best, order = similarities.topk(min(k, similarities.shape[1]))
            indices = places.gather(1, order)
        return best, indices

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.patches, BLOCK):
            yield start, self._features[start : min(start + BLOCK, self.patches)]

    def label(self, queries: Tensor, k: int, temperature: float) -> Tensor:
        """Return the share of each class (N, C) among the nearest patches, weighted by softmax(cosine / temperature).

        Args:
            queries: Features (N, D), of any length.
            k: Number of neighbors, at most M.
            temperature: Divisor of the cosine similarities.
        """
        similarities, indices = self.nearest(queries, k)
        weights = (similarities / temperature).softmax(dim=1)  # (N, k)
        shares = torch.zeros(len(queries), self._counts.shape[1], device=weights.device)
        for neighbor in range(k):  # one at a time: (N, k, C) would not fit for many classes
            counts = self._counts[indices[:, neighbor].to(self._counts.device)].to(weights)
            shares += weights[:, neighbor, None] * counts / counts.sum(1, keepdim=True)
        return shares


def class_counts(labels: Tensor, grid: tuple[int, int], patch: int, classes: int) -> Tensor:
    """Return the number of pixels of each class in each patch (h * w, C) of a label map (H, W).

    The label map is resized (nearest) to the grid first, as the image was. Ignored pixels are not counted.
    """
    resized = resize_labels(labels.long(), (grid[0] * patch, grid[1] * patch))
    cell = torch.arange(grid[0] * grid[1]).view(grid).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    counted = resized != IGNORED
    flat = cell[counted] * classes + resized[counted]
    return flat.bincount(minlength=grid[0] * grid[1] * classes).view(-1, classes)


def balanced(counts: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Return the indices of a sample of an image's patches in which rare classes are more frequent.

    The patches with the smallest scores are chosen. The score of a patch is a uniform random number times the sum, over
    the classes in the patch, of the number of patches in the image that contain the class.

    Args:
        counts: Number of pixels of each class in each patch (N, C).
        number: Number of patches to choose; all are returned if there are fewer.
        generator: Random generator on the CPU.
    """
    present = (counts > 0).double()
    scores = present @ present.sum(0) * torch.rand(len(counts), dtype=torch.float64, generator=generator)
    return scores.topk(min(number, len(counts)), largest=False).indices
