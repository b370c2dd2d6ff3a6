"""Compute memory and time of training from the networks, and write docs/howto/gpu_memory.md.

    python scripts/compute_costs.py

Nothing is timed. Parameters and floating-point operations are counted on the meta device, bytes that are saved for the
backward pass in one real step on the CPU under bf16 autocast. Times follow from the operations and the share of the
peak rate that the paper's own times amount to.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spar_lightning.backbones import DINOv3Text, OpenCLIP, SigLIP2
from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.parameter_groups import set_trainable
from spar_lightning.formatting import bytes_text, hours_text, markdown

FAMILIES = {
    "SigLIP2 ViT-B/16": (SigLIP2, {"pretrained": None}),
    "OpenCLIP ViT-B/16": (OpenCLIP, {"pretrained": None}),
    "DINOv3.txt ViT-L/16": (DINOv3Text, {}),
}
TRAINABLE = {"last two blocks": ("blocks.-2", "blocks.-1"), "all": ("all",)}
IMAGES = {"512 x 512": (512, 512), "1024 x 1024": (1024, 1024), "1024 x 2048": (1024, 2048)}
# Memory in GB and peak rate of dense bf16 matrix products in TFLOP/s, from the data sheets of the manufacturer.
GPUS = {
    "RTX 4090": (24, 165),
    "RTX A6000": (48, 155),
    "L40S": (48, 362),
    "A100 80 GB": (80, 312),
    "H100 SXM": (80, 989),
}
# The paper reports 9 GPU hours for the features and 1.5 hours on two GPUs for 10 epochs (25,000 images, A6000).
PAPER_HOURS = {"features": 9.0, "training": 3.0}
WINDOWS, PATCHES, EPOCHS, COUNT = 211, 2602, 10, 25_000  # means per image of the `released` augmentation
FRAMEWORK = 0.6e9  # bytes of the CUDA context and libraries; an assumption


def on_meta(family: str) -> Backbone:
    """Return the backbone without memory for its weights."""
    cls, arguments = FAMILIES[family]
    with torch.device("meta"):
        backbone: Backbone = cls(**arguments)
        return backbone


def operations(backbone: Backbone, height: int, width: int, trainable: tuple[str, ...] = ()) -> float:
    """Return the floating-point operations of a forward pass, with a backward pass if something is trainable."""
    set_trainable(backbone, backbone.parameter_groups(), trainable or ("all",))
    images = torch.zeros(1, 3, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(bool(trainable)):
        features = backbone(images)
        if trainable:
            features.square().mean().backward()
    return float(counter.get_total_flops())


def saved_bytes(family: str, trainable: tuple[str, ...], side: int) -> int:
    """Return the bytes that a step saves for its backward pass, without parameters, under bf16 autocast on the CPU."""
    cls, arguments = FAMILIES[family]
    backbone = cls(**arguments)
    set_trainable(backbone, backbone.parameter_groups(), trainable)
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dim() > 2:  # weights cast to bf16 have two dimensions
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        backbone(torch.zeros(1, 3, side, side)).float().square().mean()
    return sum(found.values())


def memory_rows() -> list[list[str]]:
    """Return a row for each network and choice of trainable parts: parameters and memory of a step per image size."""
    rows = []
    for family in FAMILIES:
        backbone = on_meta(family)
        total = sum(p.numel() for p in backbone.parameters())
        for title, trainable in TRAINABLE.items():
            chosen = set_trainable(backbone, backbone.parameter_groups(), trainable)
            trained = sum(p.numel() for p in chosen)
            side = 16 * 32
            per_patch = saved_bytes(family, trainable, side) / 32**2
            fixed = FRAMEWORK + 4 * total + 12 * trained + 2 * total  # fp32 weights, gradients and AdamW, bf16 copies
            sizes = [bytes_text(int(fixed + per_patch * h * w / 16**2)) for h, w in IMAGES.values()]
            rows.append([family, title, f"{trained / 1e6:.0f} of {total / 1e6:.0f} M", *sizes])
    return rows


def time_rows() -> tuple[list[list[str]], dict[str, float]]:
    """Return a row per GPU with the hours of 25,000 images, and the share of the peak that the paper's times imply."""
    backbone = on_meta("SigLIP2 ViT-B/16")
    window = operations(backbone, backbone.window, backbone.window)
    side = 16 * round(PATCHES**0.5)
    step = operations(backbone, side, side, TRAINABLE["last two blocks"])
    work = {"features": COUNT * WINDOWS * window, "training": COUNT * EPOCHS * step}
    peak = GPUS["RTX A6000"][1] * 1e12
    share = {stage: work[stage] / (PAPER_HOURS[stage] * 3600 * peak) for stage in work}
    rows = []
    for gpu, (memory, rate) in GPUS.items():
        hours = [work[stage] / (share[stage] * rate * 1e12) / 3600 for stage in work]
        rows.append([gpu, f"{memory} GB", f"{rate} TFLOP/s", *(hours_text(value) for value in hours)])
    share["window GFLOP"], share["step TFLOP"] = window / 1e9, step / 1e12
    return rows, share


PAGE = """# Plan GPU memory and time

This page estimates which GPU you need and how long it takes. **All numbers are computed, none is measured**: written by
`python scripts/compute_costs.py` from the networks, the data sheets of the GPUs and the times that the paper reports.
`spar cache --plan_only` measures the rate on your machine.

## Memory of a training step

One image per step, `bf16-mixed`, teacher features from the cache. The numbers contain fp32 weights with their bf16
copies, gradients and AdamW states of the trained parts, activations that are saved for the backward pass, and
{framework} for CUDA and its libraries. They do not contain temporary buffers.

{memory}

Activations grow linearly with the patches. To save memory:

- Train fewer blocks ([Choose what trains](trainable.md)).
- Keep `data.batch_size: 1`. Images have different sizes, and a batch does not make small networks faster by much.

The teacher needs no activations for a backward pass. `model.window_batch` (windows per forward pass) sets its memory.

## Time for 25,000 images

SigLIP2 ViT-B/16, `released` augmentation (on average {windows} windows and {patches:,} patches per image), one GPU. A
window takes {window:.0f} GFLOP and a training step with two trained blocks {step:.2f} TFLOP. The paper reports 9 GPU
hours for the features and 1.5 hours on two GPUs for 10 epochs, both on A6000. That is {features:.0%} and {training:.0%}
of the peak rate of this GPU, and the table assumes the same share for the others.

{time}

Processes do not communicate while they compute features, so more GPUs divide the time almost evenly (in shards of 64
images). `data.cache_activations: true` saves about 60 % of the operations of a training step, because the frozen blocks
are not run ([Performance](../performance.md)).

## Disk

{disk}

[Data](../data.md) has the tables for more images and for the other augmentations.
"""

DISK = """| `data.cache_dtype` | features and images of 25,000 images |
| --- | --- |
| `int8` | about 59 GB |
| `float16` (default) | about 127 GB |
| `float16` with `data.cache_activations` | about 229 GB |
| `float32` | about 229 GB |"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    times, share = time_rows()
    memory = markdown([["network", "trained", "parameters", *IMAGES], *memory_rows()])
    time = markdown([["GPU", "memory", "bf16 peak", "teacher features", "10 epochs of training"], *times])
    page = PAGE.format(
        memory=memory, time=time, disk=DISK, windows=WINDOWS, patches=PATCHES, window=share["window GFLOP"],
        step=share["step TFLOP"], features=share["features"], training=share["training"],
        framework=bytes_text(int(FRAMEWORK)),
    )  # fmt: skip
    path = Path(__file__).parents[1] / "docs" / "howto" / "gpu_memory.md"
    path.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
