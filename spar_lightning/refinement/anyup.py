"""AnyUp: image-guided upsampling of any maps from the patch grid to the size of an image.

Wimmer et al., AnyUp: Universal Feature Upsampling (ICLR 2026, arXiv 2510.12764): each pixel gets an average of the
maps at nearby patches, weighted by attention between image and patches. This implementation gives the official results
with the official weights (CC-BY-4.0, github.com/wimmerth/anyup) in a fraction of the memory. The full-size layers are
1 x 1 convolutions between norms; they process the image in pieces and in place. The attention runs in bands of rows.

Shapes: C maps, H x W pixels of the image, h x w patches, 128 internal channels.
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
from spar_lightning.files.home import expand_home
from spar_lightning.refinement.anyup_attention import WindowAttention
from spar_lightning.refinement.anyup_encoders import WIDTH, Encoder, Pointwise, Rotation, Smoothing, Unification

BILINEAR: Final = "bilinear"  # value of the setting that disables AnyUp
RELEASES: Final = "https://github.com/wimmerth/anyup/releases/download"
OFFICIAL: Final = {  # names as in the official torch.hub entry points
    "anyup": f"{RELEASES}/checkpoint/anyup_paper.pth",
    "anyup_multi_backbone": f"{RELEASES}/checkpoint_v2/anyup_multi_backbone.pth",
}


class AnyUp(nn.Module):
    """Image-guided upsampler for any maps, for inference only.

    Args:
        weights: `anyup` (weights of the paper, trained with DINOv2 only), `anyup_multi_backbone` (trained with five
            backbones, including SigLIP2), or the path of either file. The named weights are downloaded once (3.5 MB).
            null selects random weights.
    """

    mean = (0.485, 0.456, 0.406)  # ImageNet statistics, for maps of any backbone
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
        """Return the name and the hash of the weights, which determine the upsampled maps."""
        return {"name": "AnyUp", "weights": hash_tensors(self.state_dict())}

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize pixels (..., 3, H, W) in [0, 1] to a guide image."""
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels - mean) / std).to(self.rope.freqs.dtype)

    @torch.no_grad()
    def forward(self, images: Tensor, maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Upsample maps (B, C, h, w) of any kind, such as features or scores, to (B, C, H', W').

        Args:
            images: Guide images (B, 3, H, W), normalized with `mean` and `std`.
            maps: Maps to upsample. All values of the result are weighted averages of their values.
            size: H' and W'; None uses the size of the images.
        """
        results = []
        for image, values in zip(images, maps, strict=True):
            queries, keys = self.encode(image, values, size)
            results.append(torch.cat(list(self.cross_decode.rows(queries, keys, values)), dim=1))
        return torch.stack(results)

    @torch.no_grad()
    def encode(self, image: Tensor, maps: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Compute the queries (128, H', W') and keys (128, h, w) of one image, for `cross_decode.rows`."""
        grid = (maps.shape[-2], maps.shape[-1])
        keys = F.adaptive_avg_pool2d(self.key_encoder(self._encoded(image)), grid)
        keys = torch.cat([keys, self.key_features_encoder(F.normalize(maps.to(keys.dtype), dim=0))])
        queries = self.query_encoder(self._encoded(image))  # encoded again, to avoid a third full-size tensor
        if size is not None and size != tuple(image.shape[-2:]):
            queries = F.adaptive_avg_pool2d(queries, size)
        return queries, self.aggregation(keys)

    def _encoded(self, image: Tensor) -> Tensor:
        """Encode an image (3, H, W) to 128 channels (128, H, W)."""
        encoded: Tensor = self.rope(self.image_encoder(image))
        return encoded


def _tensors(weights: str) -> dict[str, Tensor]:
    """Read the weights once per process and file, because each segmenter builds its own upsampler."""
    check_weights(weights)
    path = official(weights) if weights in OFFICIAL else Path(expand_home(weights))
    stat = path.stat()
    return _read(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(2)
def _read(path: str, size: int, time: int) -> dict[str, Tensor]:
    return read(path)


def official(name: str) -> Path:
    """Return the file of official weights in the torch.hub cache; download it if it is missing.

    Raises:
        WeightsError: If the download fails.
    """
    url = OFFICIAL[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except (OSError, HTTPException) as error:  # URLError is an OSError
            raise WeightsError(
                f"The weights {name} cannot be downloaded from {url} ({error}). Download the file on another machine, "
                f"and pass its path or copy it to {path}."
            ) from error
    return path


def check_weights(weights: str) -> None:
    """Raise UserError unless `weights` names official weights or an existing file."""
    if weights not in OFFICIAL and not Path(expand_home(weights)).is_file():
        raise UserError(
            f"upsampler: {weights!r} is not a known name or an existing file. "
            f"{nearest(weights, [BILINEAR, *OFFICIAL])}Allowed: {BILINEAR}, {', '.join(OFFICIAL)}, "
            "or the path of an AnyUp weight file."
        )
