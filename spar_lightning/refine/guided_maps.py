"""Maps of class names at the pixels of the network's image, made by AnyUp as they are asked for."""

from collections.abc import Iterator

from torch import Tensor

from spar_lightning.refine.anyup import AnyUp


class GuidedMaps:
    """Maps on the patch grid, brought to the pixels of an image, a band of rows at a time.

    Args:
        upsampler: On the device of the maps.
        image: The guide (3, H, W), normalised for the upsampler.
        maps: Maps of all names (Q, h, w).
    """

    def __init__(self, upsampler: AnyUp, image: Tensor, maps: Tensor) -> None:
        self._attention, self._maps = upsampler.cross_decode, maps
        self._queries, self._keys = upsampler.encode(image, maps)
        self.size = (image.shape[-2], image.shape[-1])
        self.names_at_once = len(maps)

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        """Maps (q, n, W), n rows of pixels at a time."""
        yield from self._attention.rows(self._queries, self._keys, self._maps[names])
