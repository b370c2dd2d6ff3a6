"""Export of any backbone to one ONNX graph from pixels to dense features, with dynamic height and width.

Tracing fixes every Python decision that depends on the size of the example. The example is therefore larger than the
native size, so that shortcuts for the native size are not traced. A graph with a fixed output side is rejected.
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.tiles import GROUP
from spar_lightning.errors import UserError
from spar_lightning.export.recipe import Recipe, Recipes
from spar_lightning.student import Student

FILE: Final = "student.onnx"
LARGEST_REACH: Final = 4
HINT: Final = "Remove code that converts a size to a number, such as len(images) or float(h)."


class Graph(nn.Module):
    """Module that maps pixels (B, 3, H, W) in [0, 1] to features (B, h, w, d)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the dense features of pixels."""
        features: Tensor = self.backbone((pixels - self.mean) / self.std)
        return features


def write(student: Student, folder: Path) -> None:
    """Write the graph to `student.onnx`: one file, unless the weights exceed the size limit of ONNX.

    Raises:
        UserError: A package of the `onnx` extra is not installed, or the backbone cannot be traced for all sizes.
    """
    try:
        import onnxruntime  # noqa: F401 - used by the check; fail before minutes of tracing
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--to onnx requires a package that is not installed ({error}). Run: pip install 'spar-lightning[onnx]'"
        ) from error
    backbone = student.backbone
    if backbone.windowed is not None and backbone.windowed.reach > LARGEST_REACH:  # each tile gathers k x k keys
        raise UserError(
            f"--to onnx needs an attention.reach of at most {LARGEST_REACH}, but got {backbone.windowed.reach:g}. "
            "Export --to safetensors, or train with a smaller reach."
        )
    patch, side = backbone.patch_size, backbone.window // backbone.patch_size
    free = {0: Dim("batch", min=1, max=4096)}
    free |= {axis: patch * Dim(name, min=side + 1, max=4096) for axis, name in ((2, "h"), (3, "w"))}
    length = max(side, 2 * GROUP) + 1  # several groups of tiles: tracing specializes sizes of 1
    example = torch.zeros(2, 3, length * patch, (length + 2) * patch)
    try:
        with torch.no_grad():
            program = torch.export.export(Graph(backbone).eval(), (example,), dynamic_shapes=(free,), strict=False)
        graph: Any = torch.onnx.export(
            program, dynamo=True, input_names=["pixels"], output_names=["features"], verbose=False
        )
    except Exception as error:  # torch raises many types, with texts of up to 60 lines
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise UserError(
            f"{type(backbone).__name__} cannot be traced for all image sizes ({type(error).__name__}: {reason[:300]}). "
            f"{HINT}"
        ) from error
    model = graph.model.graph
    for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
        model.inputs[0].shape[axis] = name
    if any(isinstance(size, int) for size in model.outputs[0].shape[:3]):
        raise UserError(
            f"{type(backbone).__name__} cannot be exported to ONNX for all image sizes: its output has shape "
            f"{list(model.outputs[0].shape)}. {HINT}"
        )
    for node in model:
        node.metadata_props.clear()  # stack traces contain local paths
    graph.save(folder / FILE)


LOAD: Final = """
import onnxruntime

model = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
"""

ANY_SIZE: Final = '''
import torch


def dense(model, pixels):
    """Return features (B, h, w, d) of pixels in [0, 1], which the graph normalizes."""
    return torch.from_numpy(model.run(["features"], {"pixels": pixels.numpy()})[0])
'''

SIZES: Final = (
    "The graph accepts any batch size, and any height and width that are multiples of the patch size. It adapts the "
    "positional embedding to the image size as in training, and contains windowed attention if the student uses it."
)

RECIPES: Final[Recipes] = {
    Backbone: Recipe(write, LOAD, ANY_SIZE, SIZES, tokens=None, pixels=True, tolerance=1e-3)  # type: ignore[type-abstract]
}
