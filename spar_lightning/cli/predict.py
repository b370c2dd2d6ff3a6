"""`spar predict`: label maps, overlays, scores, features and PCA pictures of images, with any weights."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from spar_lightning.cli.backbone_arguments import split_backbone_arguments
from spar_lightning.cli.parser import Formatter, Parser
from spar_lightning.cli.predict_inputs import image_files
from spar_lightning.cli.predict_outputs import PredictionFolder
from spar_lightning.errors import UserError
from spar_lightning.formatting import bytes_text
from spar_lightning.image.codec import ImageError
from spar_lightning.image.inputs import as_pixels
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.prompts import parse_classes
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.student import Student, load_student, usable_device
from spar_lightning.visualization.pca import Basis, draw_pca

MOST_SCORES: Final = 4 * 2**30  # bytes of one image's scores in memory

DESCRIPTION = """Segment images of any size with a trained student, or with a backbone as it comes.

Labels have the size of the image. --out gets labels/ (PNG with a palette), overlays/ (with a legend) and
classes.json; on request scores/, features/ and pca/. Images that cannot be read are listed at the end, and
the exit code is then 1."""

EPILOG = """examples:
  spar predict photos/ --weights runs/siglip2_vitb16 --classes "cat; dog; grass, lawn" --out out
  spar predict "photos/**/*.jpg" --weights student.safetensors --classes classes.txt --inference sliding
  spar predict photo.jpg --weights runs/siglip2_vitb16 --pca --features

`label: name, name` gives a class a label and several names. Settings of inference default to those of the run.
Arguments of the backbone that differ from those of the run are passed as --model.backbone.NAME VALUE, such as
--model.backbone.text_weights FILE."""


class NoResultError(Exception):
    """One image has no result; the others continue."""


def parser() -> Parser:
    """Return the parser; its settings of inference are the fields of `InferenceConfig`."""
    parser = Parser(
        "spar predict", description=DESCRIPTION, epilog=EPILOG, formatter_class=Formatter, default_env=False
    )
    add = parser.add_argument
    add("images", nargs="+", type=str, help="files, folders with all below them (links to folders are not followed), "
        "patterns in quotes")  # fmt: skip
    add("--weights", required=True, type=str, help="run folder, checkpoint, export, weight file with --config, or a "
        "name such as siglip2")  # fmt: skip
    add("--classes", type=str | None, help="'cat; dog; grass, lawn', or a .txt file with a class in each line")
    add("--out", type=Path, default=Path("runs/predict"), help="folder of the results")
    add("--config", type=str | None, help="YAML file of the run, if the weights do not name their network")
    add("--max_side", type=int | None, help="most pixels of the long side that the network sees; labels keep the "
        "image's size")  # fmt: skip
    add("--device", type=str | None, help="cpu, cuda, cuda:1 ..; by default a GPU if there is one")
    add("--scores", action="store_true", help="write the classes' scores of each pixel (npz)")
    add("--features", action="store_true", help="write dense features (safetensors)")
    add("--pca", action="store_true", help="draw features of single pass, teacher and student as colors, on the "
        "teacher's basis")  # fmt: skip
    parser.add_class_arguments(InferenceConfig)
    return parser


def run(args: Sequence[str]) -> int:
    """Run the command; 1 if some images could not be read."""
    own, arguments = split_backbone_arguments(args)
    options = parser()
    given = options.instantiate(options.parse_args(own))
    changed = options.parse_args(own, defaults=False)
    settings = {name: given[name] for name in InferenceConfig.__dataclass_fields__ if name in changed}
    classes = parse_classes(_class_text(given.classes)) if given.classes is not None else {}
    if not classes and (given.scores or not (given.features or given.pca)):
        raise UserError("--classes is missing: what is to be found, such as --classes 'cat; dog; grass, lawn'.")
    files, others = image_files(given.images, given.out)
    device = usable_device(given.device)
    student = load_student(given.weights, given.config, settings, arguments)
    student.backbone.to(device)
    segmenter = student.segmenter(classes, given.max_side)
    folder = PredictionFolder(given.out, classes)
    panels = _panels(student, given.max_side) if given.pca else {}
    if len(classes) == 1:
        print("There is one class, so every pixel gets it. Give a second, such as 'background'.", file=sys.stderr)
    failed: list[Exception] = []
    for file, name in tqdm(files.items(), "predict", unit="image", disable=None):
        try:
            _predict(file, name, segmenter, folder, panels, given)
        except (ImageError, NoResultError) as error:
            failed.append(error)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            failed.append(NoResultError(f"{file} is too large for the memory of {segmenter.device}. Give --max_side."))
    return _report(len(files) - len(failed), failed, others, given.out)


def _predict(
    file: Path,
    name: Path,
    segmenter: Segmenter,
    folder: PredictionFolder,
    panels: Mapping[str, Callable[[Tensor], Tensor]],
    given: Any,
) -> None:
    """Everything that was asked for of one image."""
    pixels = as_pixels(file)
    height, width = pixels.shape[-2:]
    if given.scores:
        size = 4 * (len(folder.labels) + len(segmenter.classifier.owner)) * height * width  # of classes, and of names
        if size > MOST_SCORES:
            raise NoResultError(
                f"{file} has no results: scores of {len(folder.labels):,} classes on {height} x {width} pixels take "
                f"up to {bytes_text(size)}, more than {bytes_text(MOST_SCORES)}. Leave --scores out, or give fewer "
                "classes."
            )
        labels, scores = segmenter(pixels, scores=True)
        folder.write_labels(name, pixels, labels)
        folder.write_scores(name, scores)
    elif folder.labels:
        folder.write_labels(name, pixels, segmenter(pixels))
    if given.features:
        about = {"image": str(file), "height": str(height), "width": str(width), "weights": given.weights}
        folder.write_features(name, segmenter.features(pixels), about)
    if given.pca:
        features = {title: make(pixels) for title, make in panels.items()}
        image = pixels.permute(1, 2, 0).numpy()
        draw_pca(image, features, Basis.of(features[TEACHER]), folder.path("pca", name, ".png"))


TEACHER: Final = "teacher"


def _panels(student: Student, max_side: int | None) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Who gives the features of each panel: the backbone as it was before training, and the student if there is one."""
    before = student.base()
    panels = {
        "single pass": student.segmenter({}, max_side, "single", before).features,
        TEACHER: student.segmenter({}, max_side, "sliding", before).features,
    }
    if student.weights is not None:
        panels["student"] = student.segmenter({}, max_side, "single").features
    return panels


def _class_text(given: str) -> str | list[str]:
    """Classes as given, or the lines of a text file."""
    if not given.endswith(".txt"):
        return given
    if not Path(given).is_file():
        raise UserError(f"There is no file {given}. Give a text file with a class in each line, or the classes.")
    try:
        text = Path(given).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{given} is no text in UTF-8 ({error}). Save it as such.") from error
    return [line for line in text.splitlines() if line.strip()]


def _out_of_memory(error: Exception) -> bool:
    """Whether a device has too little; on a CPU torch says so in a plain RuntimeError."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _report(done: int, failed: Sequence[Exception], others: Sequence[Path], out: Path) -> int:
    print(f"{done} {'image' if done == 1 else 'images'} done, results in {out}")
    if others:
        print(f"{len(others)} other files in the folders are no images by their suffix, such as {others[0]}")
    if failed:
        print(f"{len(failed)} without a result:", *(f"  {error}" for error in failed), sep="\n", file=sys.stderr)
    return 1 if failed else 0
