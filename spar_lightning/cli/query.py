"""`spar query`: areas and segmentation maps of any classes, from the features that `spar index` has stored."""

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from spar_lightning.cli.backbone_arguments import split_backbone_arguments
from spar_lightning.cli.class_options import given_classes
from spar_lightning.cli.parser import Parser
from spar_lightning.cli.predict_outputs import PredictionFolder
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.feature_index import FeatureIndex, ranking
from spar_lightning.formatting import markdown

DESCRIPTION = """Find and segment classes in images whose features `spar index` has stored. Only the text encoder runs,
so a query takes milliseconds per image.

The images in which a class covers the largest area are printed. --out receives areas.csv (area of each class in percent
of the image) and, for these images, labels/ (PNG with a palette), overlays/ (with a legend) and classes.json. A class
is a name, or `label: name, name` for a class with several names. Every pixel gets one of the classes, so add a
background class. Arguments of the backbone, such as its text encoder, are passed as --model.backbone.NAME VALUE."""
# They follow `spar index`.
EXAMPLES = (
    'spar query runs/index --classes "red dot; blue dot; background: plain, grain, waves, checks"',
    'spar query runs/index --classes "red dot; background: plain, grain, waves, checks" --top 20 --out runs/red',
)


def parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser("spar query", description=DESCRIPTION, default_env=False)
    parser.usage_line = "INDEX --classes CLASSES [options]"
    parser.examples = EXAMPLES
    add = parser.add_argument
    add("index", type=str, help="Folder of spar index")
    add("--classes", required=True, type=str, help="Classes to find, such as 'solar panel; roof; road', or a file of "
        "class names (.txt with one class per line, or .json)")  # fmt: skip
    add("--top", type=int, default=5, help="Number of images per class that are printed and get a segmentation map")
    add("--out", type=str | None, help="Folder for areas.csv and segmentation maps; not written by default")
    add("--all", action="store_true", help="Write segmentation maps of all images")
    add("--weights", type=str, help="Weights of the network, if they were moved since spar index")
    add("--config", type=str, help="YAML file of these weights, if they do not name their network")
    return parser


def run(args: Sequence[str]) -> int:
    """Rank the images of an index, and write segmentation maps."""
    own, arguments = split_backbone_arguments(args)
    given = parser().parse_args(own)
    check_at_least(0, **{"--top": given.top})
    if given.all and given.out is None:
        raise UserError("--all needs a folder for the segmentation maps. Pass --out.")
    if given.config is not None and given.weights is None:
        raise UserError("--config describes the network of --weights, which is missing. Pass both or none.")
    classes = given_classes(given.classes)
    index = FeatureIndex(given.index, given.weights, given.config, arguments)
    if given.out is not None:
        _check_out(Path(given.out), index)
    folder = None if given.out is None else PredictionFolder(Path(given.out), classes)
    classifier = index.classifier(classes)
    areas = list(tqdm(index.areas(classifier), "query", len(index), unit="image", disable=None))
    best = {label: ranking(areas, c, given.top) for c, label in enumerate(classes)}
    rows = []
    for c, (label, found) in enumerate(best.items()):
        rows += [[label, index.names[i], f"{100 * areas[i][c]:.1f} %"] for i in found]
        rows += [] if found or not given.top else [[label, "in no image", "0 %"]]
    if rows:
        print(markdown([["class", "image", "area"], *rows]))
    if folder is not None:
        _write_areas(folder.root / "areas.csv", index.names, list(classes), areas)
        names = _short(index.names)
        chosen = range(len(index)) if given.all else sorted({i for found in best.values() for i in found})
        for i in tqdm(chosen, "segmentation maps", unit="image", disable=None):
            labels = index.labels(i, classifier, dtype=folder.dtype)
            folder.write_labels(names[i], index.preview(i), labels)
        print(f"{len(chosen):,} segmentation maps and areas.csv in {folder.root}")
    print(f"{len(index):,} images searched")
    if index.unfinished:
        print(f"{index.unfinished:,} images have no features yet. Run spar index again.", file=sys.stderr)
    if index.rejected:
        print(f"{len(index.rejected)} other images could not be read by spar index.", file=sys.stderr)
    return 0


def _check_out(out: Path, index: FeatureIndex) -> None:
    """Raise UserError if results would be written into the index or among the images, where they would be indexed."""
    for folder in (str(index.root), *index.locations):
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            raise UserError(f"--out {out} is in {folder}. Pass a folder outside the index and its images.")


def _short(names: Sequence[str]) -> list[Path]:
    """Return the names of results: without suffix, as those of `spar predict`, unless two images would share one.

    Names in a tar file can be absolute or contain `..`; results stay in their folder.
    """
    inside = [Path(*(part for part in Path(name).parts if part not in ("..", os.sep))) for name in names]
    short = [path.with_suffix("") for path in inside]
    return short if len(set(short)) == len(short) else inside


def _write_areas(path: Path, names: Sequence[str], classes: Sequence[str], areas: Sequence[Tensor]) -> None:
    """Write the area of each class (C) in percent of each image."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *classes])
        for name, row in zip(names, areas, strict=True):
            writer.writerow([name, *(f"{100 * area:.2f}" for area in row.tolist())])
