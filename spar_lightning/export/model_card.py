"""The README of an export: what the student is, under which licence, and code that has been run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from spar_lightning import __version__
from spar_lightning.backbones import DINOv3Text
from spar_lightning.export.parity import Difference
from spar_lightning.export.recipe import Recipe
from spar_lightning.files.hashing import hash_file
from spar_lightning.formatting import markdown
from spar_lightning.student import Student

PAPER: Final = "SPAR (CVPR 2026, arXiv 2604.02252)"

CARD: Final = """\
---
tags: [spar, image-segmentation]
library_name: {library}
---

# {name}

A vision transformer that gives dense, text-aligned features of an image of any size in one pass: a student of {paper},
made with spar_lightning {version}.

{facts}

## Licence

{licence}

## Load

```python
{load}
```

{normalisation}

## Any size

{sizes}

```python
{any_size}
```

## Check

{library} {action} this folder in a process of its own, by the code above. Largest differences from the student, fp32 on
the CPU:

{differences}

## Classes

The class of a patch is the one whose text embedding has the largest cosine with its feature. Embeddings are those of
the base model's text encoder{half}; `spar_lightning.load` gives label maps of whole images.

{files}
"""


def card(student: Student, library: str, recipe: Recipe, found: Sequence[Difference], folder: Path) -> str:
    """The text, in Markdown."""
    backbone = student.backbone
    rows = [["output", "image", "largest difference"]]
    rows += [[each.output, f"{each.size[0]} x {each.size[1]}", f"{each.largest:.1e}"] for each in found]
    files = [["file", "bytes", "sha256"]]
    files += [[path.name, f"{path.stat().st_size:,}", hash_file(path)] for path in sorted(folder.iterdir())]
    if recipe.pixels:
        normalisation = "It takes RGB pixels from 0 to 1 and normalises them itself."
    else:
        normalisation = (
            f"Images are RGB, pixels from 0 to 1, normalised by mean {backbone.mean} and std {backbone.std}."
        )
    return CARD.format(
        library=library if library != "safetensors" else "spar_lightning",
        action="ran" if recipe.pixels else "loaded",
        name=f"Student of {type(backbone).__name__}",
        paper=PAPER,
        version=__version__,
        facts=markdown([["", ""], *([key, value] for key, value in facts(student).items())]),
        licence=backbone.licence(),
        load=recipe.load.strip(),
        normalisation=normalisation,
        sizes=recipe.sizes,
        any_size=recipe.any_size.strip(),
        differences=markdown(rows),
        half=", of which the second half belongs to patches" if isinstance(backbone, DINOv3Text) else "",
        files=markdown(files),
    )


def facts(student: Student) -> dict[str, str]:
    """What the student is and how it was made, as far as its run says."""
    backbone, run = student.backbone, student.run
    arguments = student.block["backbone"]["init_args"]
    rows = {
        "backbone": f"{type(backbone).__name__}({', '.join(f'{k}={_public(v)}' for k, v in arguments.items())})",
        "patch, native size, channels": f"{backbone.patch_size} px, {backbone.window} px, {backbone.embed_dim}",
        "teacher": f"the same network in windows of {backbone.window} px, stride {student.config.stride} px",
    }
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
        rows["trained"] = "no: the backbone as it comes"
    return {**rows, **_results(student)}


def _results(student: Student) -> dict[str, str]:
    """Mean IoU of the run, where it measured any."""
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


# Rows of results.json in words; the last need not be those of the best checkpoint.
STAGES: Final = {"before": "single pass before training", "teacher": "teacher", "after": "single pass at the end"}


def _public(value: Any) -> str:
    """A setting, with paths cut to their last part: where things lay on a machine is nobody's business."""
    if isinstance(value, list):
        return ", ".join(map(_public, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_public(part)}" for key, part in value.items())
    local = isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).exists())
    return Path(value).name if local else str(value)
