"""Progress bar for images in blocks (`--block_size`)."""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from spar_lightning.segmentation.segmenter import Segmenter


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
