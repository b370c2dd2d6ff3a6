"""Messages of Lightning and other libraries that are not worth reading."""

import logging
import re
import warnings


def _worth_reading(record: logging.LogRecord) -> bool:
    """Return whether a record is useful: drop advertisements (litlogger, litmodels) and lists of accelerators."""
    return not re.match(r".*(litlogger|litmodels)|Seed set to|[GTH]PU available", record.getMessage())


def silence() -> None:
    """Hide Lightning's hints about other products and about settings that this package decides."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_worth_reading)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 with torch 2.15: utilities/_pytree.py
        "Found .* module.* in eval mode",  # a backbone is always in eval mode
        "The '.*_dataloader' does not have many workers",
        ".*does not have a `val_dataloader`",
        "Total length of .* across ranks is zero",  # no validation sets are configured
        "It is recommended to use `self.log.*sync_dist=True",  # MeanIoU logs values that are summed over ranks
        "LightningCLI's args parameter is intended to run from within Python",  # main(args) is that
        ".*Checkpoint directory .* exists and is not empty",  # RunFolder handles that
    ):
        warnings.filterwarnings("ignore", message)
