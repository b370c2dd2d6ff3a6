"""Compare the single pass over the whole image with blocks: differences near the borders of blocks, and far from them.

    python scripts/measure_blocks.py [--weights runs/quickstart] [--side 4000] [--block_size 1024]

The image is a mosaic of rendered scenes, because it has labels. Patches are grouped by their distance to the nearest
border of a block. For each group: 1 - cosine similarity of the features, share of the pixels with different classes,
and pixel accuracy of both. The last line compares the step from one patch to the next across a border of a block with
all other steps, as a ratio of blocks to whole image: a seam would be a ratio above that of the other steps.

The script exits with status 1 if the patches next to a border differ more than the others, or if their steps are larger
than the others by more than two standard errors.
"""

import argparse
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import spar_lightning as spar
from spar_lightning.datasets.scene_renderer import CLASSES, render
from spar_lightning.formatting import markdown
from spar_lightning.sliding_window import window_starts

SCENE = 500  # px, side of a scene
GROUPS = (0, 1, 2, 4, 8, 16, 32)  # smallest distances in patches


def mosaic(side: int) -> tuple[Tensor, Tensor]:
    """Return a square image (3, H, W) and its labels (H, W)."""
    count = -(-side // SCENE)
    scenes = [[render(11, i * count + j, SCENE, SCENE) for j in range(count)] for i in range(count)]
    image, labels = (
        np.concatenate([np.concatenate([getattr(scene, name) for scene in row], axis=1) for row in scenes])
        for name in ("image", "labels")
    )
    return torch.from_numpy(image[:side, :side]).permute(2, 0, 1), torch.from_numpy(labels[:side, :side])


def steps(features: Tensor) -> Tensor:
    """Return 1 - cosine similarity of each row of patches and the next one, averaged over columns and both axes."""
    along = (features, features.transpose(0, 1))
    return torch.stack([1 - F.cosine_similarity(f[1:], f[:-1], dim=-1).mean(1) for f in along]).mean(0)


def main() -> int:
    """Print the tables and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", default="runs/quickstart")
    parser.add_argument("--side", type=int, default=4000)
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--attention", help="full or windowed; that of the run by default")
    given = parser.parse_args()
    image, truth = mosaic(given.side)
    more = {} if given.attention is None else {"attention": given.attention}
    whole = spar.load(given.weights, CLASSES, **more)
    blocks = spar.load(given.weights, CLASSES, block_size=given.block_size, **more)
    assert blocks.blocks is not None
    patch, window = whole.backbone.patch_size, blocks.blocks.window
    one, many = whole.features(image), blocks.features(image)
    starts = window_starts(one.shape[0] * patch, window, blocks.blocks.stride)
    borders = sorted({side // patch for start in starts for side in (start, start + window)} - {0, one.shape[0]})
    distance = torch.stack([(torch.arange(one.shape[0]) + 0.5 - border).abs() for border in borders]).amin(0)
    nearest = torch.minimum(distance[:, None], distance)
    of_pixels = F.interpolate(nearest[None, None], image.shape[1:], mode="nearest")[0, 0]
    differences = 1 - F.cosine_similarity(one, many, dim=-1)
    labels, in_blocks = whole(image), blocks(image)
    rows = [["distance in patches", "patches", "1 - cosine", "other class", "accuracy, whole", "accuracy, blocks"]]
    for low, high in zip((0, *GROUPS), (one.shape[0], *GROUPS[1:], one.shape[0]), strict=True):
        group, pixels = ((values >= low) & (values < high) for values in (nearest, of_pixels))
        if group.any():
            title = "all" if (low, high) == (0, one.shape[0]) else f"{low} to {high}"
            shares = ((labels != in_blocks)[pixels], (labels == truth)[pixels], (in_blocks == truth)[pixels])
            percent = [f"{100 * share.float().mean():.2f} %" for share in shares]
            rows.append([title, f"{int(group.sum()):,}", f"{differences[group].mean():.2e}", *percent])
    print(f"{given.side} x {given.side} pixels, {blocks.blocks.count(*image.shape[1:])} blocks, borders at {borders}")
    print(markdown(rows))
    ratio = steps(many) / steps(one)
    at = torch.zeros(len(ratio), dtype=torch.bool)
    at[[border - 1 for border in borders]] = True
    near, others, error = ratio[at].mean(), ratio[~at].mean(), ratio[~at].std() / len(borders) ** 0.5
    print(
        f"Steps of blocks / steps of the whole image: {near:.4f} at borders, {others:.4f} elsewhere (standard error of "
        f"a mean of {len(borders)}: {error:.4f})"
    )
    close = nearest < 1
    return int(bool(differences[close].mean() > differences[~close].mean() or near > others + 2 * error))


if __name__ == "__main__":
    sys.exit(main())
