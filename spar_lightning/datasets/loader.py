"""Loader of images that are processed one at a time, because their sizes differ."""

from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader, Dataset

from spar_lightning.stopping import in_loader_process


def one_by_one(items: Dataset[Any], num_workers: int, order: Iterable[int] | None = None) -> DataLoader[Any]:
    """Return a loader whose batches are lists of one item.

    Args:
        items: Dataset with a length.
        num_workers: Number of processes that read; 0 reads in this one.
        order: Indices of the items, in order; None for all.
    """
    return DataLoader(items, sampler=order, collate_fn=list, num_workers=num_workers, worker_init_fn=in_loader_process)
