"""An export, loaded by its library in a fresh process, gives what the student gives.

The process runs the code of the README and nothing of this package, on images of five sizes.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError
from spar_lightning.export.recipe import Recipe

RUN: Final = """
import sys

import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads({threads})
given, results = load_file(sys.argv[1]), {{}}
with torch.no_grad():
    for name, images in given.items():
        results[f"dense {{name}}"] = dense(model, images).contiguous()
        if "tokens" in globals():
            results[f"tokens {{name}}"] = tokens(model, images).contiguous()
save_file(results, sys.argv[2])
"""


class ExportError(UserError):
    """The export does not give what the student gives."""


@dataclass(frozen=True)
class Difference:
    """Of one output at one size.

    Attributes:
        output: tokens or dense.
        size: Height and width in pixels.
        largest: Absolute difference.
    """

    output: str
    size: tuple[int, int]
    largest: float


def sizes(backbone: Backbone) -> list[tuple[int, int]]:
    """The native size and four others, in pixels: smaller, larger, much longer than wide, a few patches."""
    patch, side = backbone.patch_size, backbone.window // backbone.patch_size
    grids = ((side, side), (-(-side // 2), side + 2), (side + 3, side + 1), (2 * side + 1, -(-side // 2)), (2, 3))
    return [(h * patch, w * patch) for h, w in grids]


@torch.no_grad()
def check(backbone: Backbone, recipe: Recipe, folder: Path) -> list[Difference]:
    """Differences between what the export in a folder gives and what the backbone gives.

    Raises:
        ExportError: The code of the README fails, or a difference is above the tolerance.
    """
    images, ours = {}, {}
    for i, (height, width) in enumerate(sizes(backbone)):
        shape, generator = (1, 3, height, width), torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        normalised = backbone.normalize(pixels)
        images[str(i)] = pixels / 255 if recipe.pixels else normalised
        ours[f"dense {i}"] = backbone(normalised)
        if recipe.tokens is not None:
            ours[f"tokens {i}"] = recipe.tokens(backbone, normalised)
    theirs = run_fresh(recipe, folder, images)
    found = []
    for name, tensor in ours.items():
        output, number = name.split()
        if theirs[name].shape != tensor.shape:
            raise ExportError(f"The export gives {output} {tuple(theirs[name].shape)}, not {tuple(tensor.shape)}.")
        largest = (theirs[name] - tensor).abs().max().item()
        found.append(Difference(output, sizes(backbone)[int(number)], largest))
    if not all(difference.largest <= recipe.tolerance for difference in found):  # NaN is above, too
        worst = max(found, key=lambda difference: difference.largest)
        raise ExportError(
            f"The export does not give what the student gives: {worst.output} at {worst.size[0]} x {worst.size[1]} "
            f"differ by {worst.largest:.1e}, allowed are {recipe.tolerance:.0e}. Nothing was written."
        )
    return found


def run_fresh(recipe: Recipe, folder: Path, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the README's code gives in a process of its own, without a network."""
    with tempfile.TemporaryDirectory(prefix="spar-export-") as place:
        given, results = Path(place) / "given.safetensors", Path(place) / "results.safetensors"
        save_file(images, given)
        code = recipe.load + recipe.any_size + RUN.format(threads=torch.get_num_threads())
        done = subprocess.run(
            [sys.executable, "-c", code, str(given), str(results)],
            cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no output"]
            raise ExportError(f"The library does not load the export: {last[0]}\n{done.stderr}")
        return load_file(results)
