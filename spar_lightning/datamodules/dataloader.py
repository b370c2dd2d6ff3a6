"""ResumableLoader: a data loader that continues in the middle of an epoch, even with another number of ranks.

Lightning saves the loader state of rank 0 and restores it on all ranks, so a state that differs between ranks would be
lost. The state is the position of `samplers.EpochOrder`, which is the same on all ranks.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from spar_lightning.datamodules.samplers import EpochOrder, ResumeError
from spar_lightning.stopping import in_loader_process


class ResumableLoader(DataLoader[Any]):
    """DataLoader that saves and restores its position: the epoch and its legs.

    Args:
        dataset: Map-style dataset of the samples.
        order: Batch sampler.
        num_workers: Number of loader processes; they are kept between epochs.
        pin_memory: Copy batches to pinned memory, for faster transfer to a GPU.
        start_method: Start method of the loader processes: fork, spawn or forkserver; None uses Python's default.
        on_length: Function that is called with the order when an epoch is selected, because epochs in which the world
            changes have another number of batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: EpochOrder,
        num_workers: int,
        pin_memory: bool = False,
        start_method: str | None = None,
        on_length: Callable[[EpochOrder], None] = lambda order: None,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=list,
            persistent_workers=num_workers > 0,
            prefetch_factor=4 if num_workers else None,  # sizes differ by up to 10x: a deeper queue evens out
            pin_memory=pin_memory,
            multiprocessing_context=start_method if num_workers else None,
            worker_init_fn=in_loader_process,
        )
        self.order, self.on_length = order, on_length
        order.sampler = weakref.proxy(self)  # Lightning then calls set_epoch on the loader
        self._now, self._steps = order.position, 0
        self._loaded: dict[str, Any] | None = None  # state to resume from when the next epoch starts
        self._error: ResumeError | None = None

    def set_epoch(self, epoch: int) -> None:
        """Select an epoch."""
        self.order.set_epoch(epoch)
        self.on_length(self.order)

    def state_dict(self) -> dict[str, Any]:
        """Return the position within the epoch, which is the same on every rank."""
        if self._loaded is not None:
            return self._loaded
        leg = {**self.order.world(), "steps": self._steps}
        return {"epoch": self._now.epoch, "order": self.order.identity(), "legs": [*self._now.legs, leg]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position when the next epoch starts, if that is the epoch of the position."""
        self._loaded, self._error = state, None
        try:
            self.order.resume(state)
        except ResumeError as error:
            self._error = error  # raised if the position turns out to be in the middle of an epoch
        self.on_length(self.order)

    def _start(self) -> None:
        """Start an epoch at the loaded position or at its beginning.

        Raises:
            ResumeError: If the loaded position is in the middle of this epoch and the order has changed.
        """
        loaded, error, self._loaded, self._error = self._loaded, self._error, None, None
        if loaded is None or loaded["epoch"] != self.order.epoch:
            self.order.restart()  # the checkpoint was saved at the end of an epoch
        elif error is not None:
            raise error
        self._now = self.order.position
        self._steps = self._now.start
        self.on_length(self.order)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # As a generator, this draws nothing before the first next(), so a later set_epoch by Lightning takes effect.
        self._start()
        for batch in super().__iter__():
            self._steps += 1  # before the yield: no code runs after the last one
            yield batch
