"""Check of an export: its library, in a new process, must compute the same outputs as the student.

The process runs only the code of the README, on images of five sizes.
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

# Classes in the current folder are found, as by `spar`.
FIRST: Final = """
import sys

sys.path.append({folder!r})
"""

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
    """Error raised if an export cannot be loaded or its outputs differ from those of the student."""


@dataclass(frozen=True)
class Difference:
    """Difference between export and student in one output at one image size.

    Attributes:
        output: `tokens` or `dense`.
        size: Height and width of the image in pixels.
        largest: Largest absolute difference.
        relative: The same in standard deviations of the student's output.
    """

    output: str
    size: tuple[int, int]
    largest: float
    relative: float


def sizes(backbone: Backbone) -> list[tuple[int, int]]:
    """Return five image sizes (height, width) in pixels: native, smaller, larger, elongated, and a few patches."""
    patch, side = backbone.patch_size, backbone.window // backbone.patch_size
    grids = ((side, side), (-(-side // 2), side + 2), (side + 3, side + 1), (2 * side + 1, -(-side // 2)), (2, 3))
    return [(h * patch, w * patch) for h, w in grids]


@torch.no_grad()
def check(backbone: Backbone, recipe: Recipe, folder: Path) -> list[Difference]:
    """Compare the outputs of the export in a folder with those of the backbone.

    Returns:
        Largest difference of each output at each size.

    Raises:
        ExportError: The code of the README fails, or a difference exceeds the tolerance.
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
            raise ExportError(
                f"The export returns {output} of shape {tuple(theirs[name].shape)}, expected {tuple(tensor.shape)}."
            )
        largest = (theirs[name] - tensor).abs().max().item()
        relative = largest / tensor.std().item()
        found.append(Difference(output, sizes(backbone)[int(number)], largest, relative))
    # Relative: features of some networks are so small that an absolute tolerance would accept any graph.
    if not all(difference.relative <= recipe.tolerance for difference in found):  # NaN fails, too
        worst = max(found, key=lambda difference: difference.relative)
        raise ExportError(
            f"The outputs of the export differ from those of the student: {worst.output} at {worst.size[0]} x "
            f"{worst.size[1]} by {worst.relative:.1e} standard deviations, allowed: {recipe.tolerance:.0e}. "
            "Nothing was written."
        )
    return found


def run_fresh(recipe: Recipe, folder: Path, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the code of the README offline in a new process.

    Args:
        recipe: Recipe with the code.
        folder: Folder of the export, the working directory of the process.
        images: Image batches by name.

    Returns:
        Outputs by kind and batch, such as `dense 0`.

    Raises:
        ExportError: The process failed.
    """
    with tempfile.TemporaryDirectory(prefix="spar-export-") as place:
        given, results = Path(place) / "given.safetensors", Path(place) / "results.safetensors"
        save_file(images, given)
        code = (
            FIRST.format(folder=os.getcwd())
            + recipe.load
            + recipe.any_size
            + RUN.format(threads=torch.get_num_threads())
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(given), str(results)],
            cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no output"]
            raise ExportError(f"The library failed to load or run the export: {last[0]}\n{done.stderr}")
        return load_file(results)
