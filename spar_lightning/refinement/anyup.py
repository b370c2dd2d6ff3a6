"""AnyUp: maps of any kind, brought from the patch grid to the size of an image, guided by the image.

Wimmer et al., AnyUp: Universal Feature Upsampling (ICLR 2026, arXiv 2510.12764): every pixel takes an average of
the maps at the patches near it, weighted by attention between image and patches. Written anew, so that the official
weights (CC-BY-4.0, github.com/wimmerth/anyup) give the official numbers in a fraction of the memory: the
networks at full size are convolutions of 1 x 1 between norms, and run through the image in pieces,
in place; the attention runs in bands of rows.

Shapes: C maps, H x W pixels of the image, h x w patches, 128 channels inside.
"""

from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones.weights import WeightsError, check_fit, read
from spar_lightning.errors import UserError, nearest
from spar_lightning.files.hashing import hash_tensors
from spar_lightning.refinement.anyup_attention import WindowAttention
from spar_lightning.refinement.anyup_encoders import WIDTH, Encoder, Pointwise, Rotation, Smoothing, Unification

BILINEAR: Final = "bilinear"  # in settings: no AnyUp
RELEASES: Final = "https://github.com/wimmerth/anyup/releases/download"
OFFICIAL: Final = {  # named as by their hub
    "anyup": f"{RELEASES}/checkpoint/anyup_paper.pth",
    "anyup_multi_backbone": f"{RELEASES}/checkpoint_v2/anyup_multi_backbone.pth",
}


class AnyUp(nn.Module):
    """Upsampling of any maps, guided by an image; for inference alone.

    Args:
        weights: `anyup`, those of its paper, trained with DINOv2 alone, or `anyup_multi_backbone`, trained with five
            backbones, SigLIP2 among them; both are downloaded once (3.5 MB). Or the path of either file; null for
            random weights.
    """

    mean = (0.485, 0.456, 0.406)  # ImageNet's, whatever backbone the maps come from
    std = (0.229, 0.224, 0.225)

    def __init__(self, weights: str | None = "anyup") -> None:
        super().__init__()
        self.image_encoder = Encoder(Pointwise(3))
        self.key_encoder = Encoder(Pointwise(WIDTH))
        self.query_encoder = Encoder(Pointwise(WIDTH))
        self.key_features_encoder = Encoder(Unification())
        self.aggregation = Encoder(Smoothing())
        self.cross_decode = WindowAttention(WIDTH)
        self.rope = Rotation()
        if weights is not None:
            tensors = _tensors(weights)
            check_fit(tensors, self.state_dict(), weights, "AnyUp")
            self.load_state_dict(tensors)
        self.eval().requires_grad_(False)

    def identity(self) -> dict[str, str]:
        """What upsampled maps depend on."""
        return {"name": "AnyUp", "weights": hash_tensors(self.state_dict())}

    def normalize(self, pixels: Tensor) -> Tensor:
        """Turn pixels (..., 3, H, W) in [0, 1] into the guide."""
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels - mean) / std).to(self.rope.freqs.dtype)

    @torch.no_grad()
    def forward(self, images: Tensor, maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Maps (B, C, H', W') from maps (B, C, h, w) of any kind, features or scores.

        Args:
            images: (B, 3, H, W), normalised with `mean` and `std`.
            maps: Averages of these are all that the result holds.
            size: H' and W'; None takes the image's.
        """
        results = []
        for image, values in zip(images, maps, strict=True):
            queries, keys = self.encode(image, values, size)
            results.append(torch.cat(list(self.cross_decode.rows(queries, keys, values)), dim=1))
        return torch.stack(results)

    @torch.no_grad()
    def encode(self, image: Tensor, maps: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Queries (128, H', W') and keys (128, h, w) of one image, for `cross_decode.rows`."""
        grid = (maps.shape[-2], maps.shape[-1])
        keys = F.adaptive_avg_pool2d(self.key_encoder(self._encoded(image)), grid)
        keys = torch.cat([keys, self.key_features_encoder(F.normalize(maps.to(keys.dtype), dim=0))])
        queries = self.query_encoder(self._encoded(image))  # anew: kept, it would be a third tensor of full size
        if size is not None and size != tuple(image.shape[-2:]):
            queries = F.adaptive_avg_pool2d(queries, size)
        return queries, self.aggregation(keys)

    def _encoded(self, image: Tensor) -> Tensor:
        """The image (3, H, W) as 128 channels (128, H, W)."""
        encoded: Tensor = self.rope(self.image_encoder(image))
        return encoded


def _tensors(weights: str) -> dict[str, Tensor]:
    """Read the weights, once per process and file: every segmenter builds its own upsampler from them."""
    check_weights(weights)
    path = official(weights) if weights in OFFICIAL else Path(weights)
    stat = path.stat()
    return _read(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(2)
def _read(path: str, size: int, time: int) -> dict[str, Tensor]:
    return read(path)


def official(name: str) -> Path:
    """The file of one of the official weights, where torch.hub keeps it too; downloaded if it is not there.

    Raises:
        WeightsError: It cannot be fetched.
    """
    url = OFFICIAL[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except (OSError, HTTPException) as error:  # URLError is an OSError
            raise WeightsError(
                f"The weights of {name} cannot be fetched from {url} ({error}). Fetch the file elsewhere, and give its "
                f"path or put it at {path}."
            ) from error
    return path


def check_weights(weights: str) -> None:
    """Raise UserError if a name is neither one of the official weights nor a file."""
    if weights not in OFFICIAL and not Path(weights).is_file():
        raise UserError(
            f"upsampler: {weights!r} is no file. {nearest(weights, [BILINEAR, *OFFICIAL])}Allowed are {BILINEAR}, "
            f"{', '.join(OFFICIAL)}, and the path of a weight file of AnyUp."
        )
