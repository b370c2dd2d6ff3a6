"""README of an export: description of the student, license, and code that has been tested."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import yaml

from spar_lightning import __version__
from spar_lightning.backbones import DINOv3Text
from spar_lightning.backbones.registry import package_of
from spar_lightning.export.parity import Difference
from spar_lightning.export.recipe import Recipe
from spar_lightning.files.hashing import hash_file
from spar_lightning.formatting import markdown
from spar_lightning.sliding_window import SlidingWindow
from spar_lightning.student import Student

PAPER: Final = "SPAR (CVPR 2026, arXiv 2604.02252)"

CARD: Final = """\
---
{metadata}---

# {name}

A vision transformer that computes dense, text-aligned features of images of any size in a single forward pass. It is a
student network of {paper}, exported with spar_lightning {version}.

{facts}

## License

{license}

## Loading

```python
{load}
```

{normalization}

## Images of any size

{sizes}

```python
{any_size}
```

## Verification

{library} {action} this folder in a separate process with the code above. Largest absolute differences from the student
(fp32, CPU):

{differences}

## Classification

The class of a patch is the class whose text embedding has the largest cosine similarity to the feature of the patch.
Compute text embeddings with the text encoder of the base model{half}.
To get segmentation maps of whole images, use `spar_lightning.load`.

## Files

{files}
"""


def card(student: Student, library: str, recipe: Recipe, found: Sequence[Difference], folder: Path) -> str:
    """Return the README of an export in Markdown.

    Args:
        student: Exported student.
        library: Key of `LIBRARIES`.
        recipe: Recipe that wrote the export.
        found: Differences found by `parity.check`.
        folder: Folder of the exported files, which are listed with size and sha256.
    """
    backbone = student.backbone
    rows = [["output", "image", "largest difference"]]
    rows += [[each.output, f"{each.size[0]} x {each.size[1]}", f"{each.largest:.1e}"] for each in found]
    files = [["file", "bytes", "sha256"]]
    files += [[path.name, f"{path.stat().st_size:,}", hash_file(path)] for path in sorted(folder.iterdir())]
    if recipe.pixels:
        normalization = "Images are RGB with pixel values in [0, 1]. The model normalizes them itself."
    else:
        normalization = (
            f"Images are RGB with pixel values in [0, 1], normalized with mean {backbone.mean} and std {backbone.std}. "
            "Image sides must be multiples of the patch size."
        )
    library = "spar_lightning" if library == "safetensors" else library
    metadata = {
        "library_name": library,
        "pipeline_tag": "image-segmentation",
        "tags": ["spar", "open-vocabulary-segmentation", "vision-transformer"],
        **backbone.hub_metadata(),
    }
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        library=library,
        action="ran" if recipe.pixels else "loaded",
        name=f"Student of {type(backbone).__name__}",
        paper=PAPER,
        version=__version__,
        facts=markdown([["", ""], *([key, value] for key, value in facts(student).items())]),
        license=backbone.licence(),
        load=recipe.load.strip(),
        normalization=normalization,
        sizes=recipe.sizes,
        any_size=recipe.any_size.strip(),
        differences=markdown(rows),
        half=", and compare patches with the second half of an embedding" if isinstance(backbone, DINOv3Text) else "",
        files=markdown(files),
    )


def facts(student: Student) -> dict[str, str]:
    """Return backbone, teacher, training settings and mean IoU of the student, as far as its run records them."""
    backbone, run = student.backbone, student.run
    arguments = student.block["backbone"]["init_args"]
    windows = SlidingWindow(backbone, student.config.stride, blend=student.config.blend)
    rows = {
        "backbone": f"{type(backbone).__name__}({', '.join(f'{k}={_public(v)}' for k, v in arguments.items())})",
        "patch, native size, channels": f"{backbone.patch_size} px, {backbone.window} px, {backbone.embed_dim}",
        "teacher": f"this network before training, {windows.description()}",
    }
    if package := package_of(type(backbone)):
        rows["package of the backbone"] = package
    if backbone.windowed is not None:
        rows["attention"] = f"windowed: {_public(asdict(backbone.windowed))}"
    model, data, trainer = (run.get(key) or {} for key in ("model", "data", "trainer"))
    for key in ("trainable", "lr", "weight_decay"):
        if key in model:
            rows[key] = _public(model[key])
    arguments = data.get("init_args") or {}
    for key in ("shards", "root", "max_images", "train_scenes", "augmentation", "batch_size", "pack_tokens"):
        if arguments.get(key) is not None:
            rows[f"data.{key}"] = _public(arguments[key])
    for key in ("max_epochs", "max_steps", "precision"):
        if trainer.get(key) not in (None, -1):
            rows[f"trainer.{key}"] = _public(trainer[key])
    if student.weights is None:
        rows["trained"] = "no (backbone without distillation)"
    return {**rows, **_results(student)}


def _results(student: Student) -> dict[str, str]:
    """Return the mean IoU of each stage of the run; empty if the run did not measure it."""
    if student.weights is None or student.weights.absolute().parent.name != "checkpoints":
        return {}
    path = student.weights.absolute().parents[1] / "results.json"
    if not path.is_file():
        return {}
    found = {}
    for row in json.loads(path.read_text()):
        scores = ", ".join(f"{name} {score:.1f}" for name, score in row["miou"].items())
        found[f"mIoU of the run, {STAGES.get(row['stage'], row['stage'])}"] = scores
    return found


# Stages of results.json. "after" belongs to the final weights, which may differ from those of the best checkpoint.
STAGES: Final = {
    "before": "single pass before training",
    "teacher": "teacher",
    "after": "single pass at the end of training",
}


def _public(value: Any) -> str:
    """Format a setting as text. Paths are cut to their last part, so that local folders are not published."""
    if isinstance(value, list):
        return ", ".join(map(_public, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_public(part)}" for key, part in value.items())
    local = isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).exists())
    return Path(value).name if local else str(value)
