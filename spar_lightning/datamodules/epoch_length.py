"""Length of an epoch for Lightning's loops, which assume that all epochs of a run have the same number of batches.

An epoch in which the number of ranks changes is longer or shorter than the others.
"""

from typing import Any

from lightning.pytorch import Trainer

from spar_lightning.datamodules.dataloader import ResumableLoader
from spar_lightning.datamodules.samplers import EpochOrder


def set_epoch_length(trainer: Trainer, order: EpochOrder) -> None:
    """Pass the number of batches of an epoch to the Trainer, which computes it only at the start of a run.

    Args:
        trainer: Trainer of the run.
        order: Order of the training samples, at the epoch.
    """
    loop, limit, interval = trainer.fit_loop, trainer.limit_train_batches, trainer.val_check_interval
    loader, combined = trainer.train_dataloader, loop._combined_loader
    if not isinstance(loader, ResumableLoader) or loader.order is not order:
        return  # another loader than that of the Trainer
    assert combined is not None
    assert combined.limits is not None
    if loop.restarting and loop._data_fetcher is None:
        _correct_counters(loop, order, limit)
    batches, progress = order.count(limit), loop.epoch_loop.batch_progress
    if loop.restarting and progress.is_last_batch:
        batches = progress.current.ready  # the epoch is over, even if other ranks would have more batches
    combined.limits[:] = [batches]
    loop.max_batches = batches
    if loop._data_fetcher is not None:
        loop._data_fetcher.length = batches
    if isinstance(interval, float):
        trainer.val_check_batch = max(1, int(batches * interval))


def _correct_counters(loop: Any, order: EpochOrder, limit: int | float | None) -> None:
    """Correct Lightning's counters after they were loaded from a checkpoint.

    Args:
        loop: Fit loop of the Trainer.
        order: Order at the position of the checkpoint.
        limit: The Trainer's limit_train_batches.
    """
    progress, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress
    ended = epochs.current.processed == epochs.current.ready  # saved in on_train_epoch_end
    if ended and progress.is_last_batch:
        # With max_steps, Lightning would end this epoch again instead of starting the next one.
        loop._restarting = loop.epoch_loop.restarting = False
        order.set_epoch(epochs.current.processed)
        return
    if ended:  # max_steps has stopped the run within the epoch, which Lightning counts as the end of the epoch
        for counter in (epochs.current, epochs.total):
            counter.processed -= 1
    if order.count(limit) == order.finished and not progress.is_last_batch:
        # Too few images are left for a step: continue as after the last batch, before its validation.
        if progress.total.completed != progress.total.processed:  # saved in on_train_batch_end
            progress.total.completed, progress.current.completed = progress.total.processed, progress.current.processed
            loop.epoch_loop._batches_that_stepped += 1
        progress.is_last_batch = True
        validation = loop.epoch_loop.val_loop.batch_progress.total
        validation.ready = validation.started = validation.processed + 1  # Lightning repeats what was only started
