"""Students as one ONNX graph for any backbone: pixels in, dense features out, height and width free.

A tracer fixes whatever Python decides by the size of its example. The example is therefore larger than the native
size, where no shortcut for that size is taken, and a graph whose output has a fixed side is refused.
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError
from spar_lightning.export.recipe import Recipe, Recipes
from spar_lightning.student import Student

FILE: Final = "student.onnx"


class Graph(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] to features (B, h, w, d)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.backbone((pixels - self.mean) / self.std)
        return features


def write(student: Student, folder: Path) -> None:
    """The graph, in one file as long as ONNX can hold it.

    Raises:
        UserError: The exporter of torch is not installed, or the backbone cannot be traced for all sizes.
    """
    try:
        import onnxruntime  # noqa: F401 - of the check, before minutes of tracing
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--to onnx needs a package that is not installed ({error}): pip install 'spar-lightning[onnx]'."
        ) from error
    backbone = student.backbone
    patch, side = backbone.patch_size, backbone.window // backbone.patch_size
    free = {0: Dim("batch", min=1, max=4096)}
    free |= {axis: patch * Dim(name, min=side + 1, max=4096) for axis, name in ((2, "h"), (3, "w"))}
    example = torch.zeros(2, 3, (side + 1) * patch, (side + 3) * patch)
    with torch.no_grad():
        program = torch.export.export(Graph(backbone).eval(), (example,), dynamic_shapes=(free,), strict=False)
    graph: Any = torch.onnx.export(
        program, dynamo=True, input_names=["pixels"], output_names=["features"], verbose=False
    )
    model = graph.model.graph
    for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
        model.inputs[0].shape[axis] = name
    if any(isinstance(size, int) for size in model.outputs[0].shape[:3]):
        raise UserError(
            f"{type(backbone).__name__} cannot become a graph for all sizes: its features come out as "
            f"{list(model.outputs[0].shape)}. Somewhere it turns a size into a number, such as len(images) or float(h)."
        )
    for node in model:
        node.metadata_props.clear()  # stack traces, with paths of this machine
    graph.save(folder / FILE)


LOAD: Final = """
import onnxruntime

model = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
"""

ANY_SIZE: Final = '''
import torch


def dense(model, pixels):
    """Features (B, h, w, d) of pixels in [0, 1]: the graph normalises them."""
    return torch.from_numpy(model.run(["features"], {"pixels": pixels.numpy()})[0])
'''

SIZES: Final = (
    "The graph takes any height and width that the patch divides, and any batch; it resizes the table of positions as "
    "the student was trained."
)

RECIPES: Final[Recipes] = {
    Backbone: Recipe(write, LOAD, ANY_SIZE, SIZES, tokens=None, pixels=True, tolerance=1e-3)  # type: ignore[type-abstract]
}
