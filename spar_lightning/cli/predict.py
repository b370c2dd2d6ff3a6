"""`spar predict`: label maps, overlays, scores, features and PCA pictures of images, with any weights."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from spar_lightning.cli.backbone_arguments import backbone_arguments
from spar_lightning.cli.image_files import image_files
from spar_lightning.cli.prediction_folder import PredictionFolder
from spar_lightning.datamodules.estimate import bytes_text
from spar_lightning.datamodules.image import ImageError
from spar_lightning.errors import UserError
from spar_lightning.loading import Student, load_student, usable_device
from spar_lightning.pictures.pca import Basis, draw_pca
from spar_lightning.pixels import as_pixels
from spar_lightning.refine import Refinement
from spar_lightning.segmenter import Inference, Segmenter
from spar_lightning.zero_shot import parse_classes

MOST_SCORES: Final = 4 * 2**30  # bytes of one image's scores in memory

DESCRIPTION = """Segment images of any size with a trained student, or with a backbone as it comes.

Labels have the size of the image. --out gets labels/ (PNG with a palette), overlays/ (with a legend) and
classes.json; on request scores/, features/ and pca/. Images that cannot be read are listed at the end, and
the exit code is then 1."""

EPILOG = """examples:
  spar predict photos/ --weights runs/siglip2_vitb16 --classes "cat; dog; grass, lawn" --out out
  spar predict "photos/**/*.jpg" --weights student.safetensors --classes classes.txt --inference sliding
  spar predict photo.jpg --weights runs/siglip2_vitb16 --pca --features

`label: name, name` gives a class a label and several names. Arguments of the backbone that differ from those of
the run follow as --model.backbone.NAME VALUE, such as --model.backbone.text_weights FILE."""


class NoResultError(Exception):
    """One image has no result; the others go on."""


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        "spar predict", description=DESCRIPTION, epilog=EPILOG, formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "images",
        nargs="+",
        help="files, folders with all below them (links to folders are not followed), patterns in quotes",
    )
    add("--weights", required=True, help="run folder, checkpoint, export, weight file with --config, or a name "
        "such as siglip2")  # fmt: skip
    add("--classes", help="'cat; dog; grass, lawn', or a .txt file with a class in each line")
    add("--out", type=Path, default=Path("runs/predict"), help="folder of the results (runs/predict)")
    add("--config", help="YAML file of the run, where the weights do not say what they are of")
    add("--inference", choices=get_args(Inference), help="single pass or sliding window; as the run otherwise")
    add("--stride", type=int, help="step between windows in pixels; as the run otherwise")
    add("--refine", choices=get_args(Refinement), help="LPOSS; as the run otherwise")
    add("--upsampler", help="bilinear, anyup, anyup_multi_backbone or a weight file; as the run otherwise")
    add("--max-side", type=int, help="most pixels of the long side that the network sees; labels keep the image's size")
    add("--device", help="cpu, cuda, cuda:1 ..; a GPU otherwise if there is one")
    add("--scores", action="store_true", help="write the classes' scores of each pixel (npz)")
    add("--features", action="store_true", help="write dense features (safetensors)")
    add("--pca", action="store_true", help="draw features of single pass, teacher and student as colours, on the "
        "teacher's basis")  # fmt: skip
    return parser


def run(args: Sequence[str]) -> int:
    """Run the verb; 1 where some images could not be read."""
    given, rest = parser().parse_known_args(args)
    classes = parse_classes(_class_text(given.classes)) if given.classes is not None else {}
    if not classes and (given.scores or not (given.features or given.pca)):
        raise UserError("--classes is missing: what is to be found, such as --classes 'cat; dog; grass, lawn'.")
    files, others = image_files(given.images, given.out)
    settings = {name: getattr(given, name) for name in ("inference", "stride", "refine", "upsampler")}
    chosen = {name: value for name, value in settings.items() if value is not None}
    device = usable_device(given.device)
    student = load_student(given.weights, given.config, chosen, backbone_arguments("predict", rest))
    student.module.to(device)
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
            failed.append(NoResultError(f"{file} is too large for the memory of {segmenter.device}. Give --max-side."))
    return _report(len(files) - len(failed), failed, others, given.out)


def _predict(
    file: Path,
    name: Path,
    segmenter: Segmenter,
    folder: PredictionFolder,
    panels: Mapping[str, Callable[[Tensor], Tensor]],
    given: Namespace,
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
