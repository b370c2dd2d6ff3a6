"""Images in blocks (`--block_size`): check of the option, and a progress bar for the blocks of one image."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from spar_lightning.errors import UserError
from spar_lightning.segmentation.segmenter import Segmenter


def check_block_size(given: Mapping[str, Any], segmenter: Segmenter) -> None:
    """Raise UserError if the option --block_size was given, but has no effect."""
    if given.get("block_size") is not None and segmenter.blocks is None:
        raise UserError(
            "--block_size divides images for the single pass, but inference is sliding, which divides them into "
            "windows already. Leave out one of them."
        )


@contextmanager
def block_bar(segmenter: Segmenter, count: int, title: str) -> Iterator[None]:
    """Show how many blocks are done, and their rate.

    Args:
        segmenter: Segmenter that processes the blocks in the context.
        count: Number of blocks; less than two have no bar.
        title: Title of the bar.
    """
    if count < 2:
        yield
        return
    with tqdm(total=count, desc=title, unit="block", leave=False, disable=None) as bar:
        hook = segmenter.backbone.register_forward_hook(lambda _, images, __: bar.update(len(images[0])) and None)
        try:
            yield
        finally:
            hook.remove()
