"""`spar evaluate --check` and `--prepare`: check of the benchmark folders, and label maps from downloads."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from spar_lightning.errors import UserError, nearest
from spar_lightning.evaluation import ade20k_full, pascal_context
from spar_lightning.evaluation.benchmark import Benchmark, opened_later
from spar_lightning.evaluation.benchmark_config import PREPARED, SETS, SHIPPED, read, shipped


def check(root: Path, rest: Sequence[str]) -> int:
    """Print the benchmarks found in a folder; return 1 if anything is missing."""
    parser = ArgumentParser("spar evaluate --check", description=check.__doc__)
    parser.add_argument("--benchmarks", default="standard10", help="names and sets, separated by commas; default: all")
    given = parser.parse_args(rest)
    if not root.is_dir():
        raise UserError(f"--check {root}: the folder does not exist.")
    wanted = [part.strip() for part in given.benchmarks.split(",") if part.strip()]
    names = [benchmark.source for benchmark in opened_later(wanted, str(root))]
    if unknown := [name for name in names if name not in SHIPPED]:
        raise UserError(
            f"--check looks for bundled benchmarks, but got {unknown[0]!r}. {nearest(unknown[0], [*SETS, *SHIPPED])}"
            f"Allowed: {', '.join([*SETS, *SHIPPED])}."
        )
    problems = {name: _problem(name, root) for name in names}
    if any(problems.values()):
        print("\nExpected locations (the first one that exists is used):")
    for name in (name for name, problem in problems.items() if problem):
        print(f"{name}\n{_layout(name, root)}")
    return int(any(problems.values()))


def _problem(name: str, root: Path) -> bool:
    """Print the state of a benchmark; return True if anything is missing."""
    benchmark = Benchmark(name, str(root))
    try:
        benchmark.open()
    except UserError as error:  # also of a folder that cannot be read
        print(f"{name:<11} {str(error).removeprefix(f'{name} ').split(' `spar evaluate')[0]}")
        return True
    no_image = [stem for i, stem in enumerate(benchmark.stems) if not benchmark.has_image(i)]
    no_labels = [stem for stem in benchmark.stems if not benchmark.has_labels(stem)]
    count = len(benchmark)
    images, labels = count - len(no_image), count - len(no_labels)
    print(f"{name:<11} {images} of {count} images, {labels} of {count} label maps in {benchmark.folder}")
    for stems, what in ((no_image, "image"), (no_labels, "label map")):
        if stems:
            print(f"{'':<11} first without {what}: {stems[0]}")
    expected = benchmark.description.expected_images
    if expected not in (None, count):
        print(f"{'':<11} {expected} images are expected")
    return bool(no_image or no_labels or expected not in (None, count))


def _layout(name: str, root: Path) -> str:
    """Return the expected paths of the files of a benchmark, one per line."""
    description = read(shipped()[name])
    folders = description.folder
    parts = [*description.images, *(f"{kind.file}" for kind in description.labels)]
    lines = [f"  {root / folders[0]}/{part.replace('{}', 'NAME')}" for part in parts]
    if description.split:
        lines.append(f"  {root / folders[0]}/{description.split}")
    lines.append(f"  or the same in {' or '.join(str(root / folder) for folder in folders[1:])}")
    if name in PREPARED:
        command = f"spar evaluate --prepare {PREPARED[name]} --root {root}"
        lines.append(f"  `{command}` creates label maps and lists of images from the download")
    return "\n".join(lines)


def prepare(what: str, rest: Sequence[str]) -> int:
    """Create the label maps of a benchmark from its download."""
    allowed, what = sorted({*PREPARED.values()}), PREPARED.get(what, what)
    if what not in allowed:
        raise UserError(
            f"--prepare {what}: {'this benchmark is read as downloaded' if what in SHIPPED else 'unknown benchmark'}. "
            f"{nearest(what, allowed)}Allowed: {', '.join(allowed)}."
        )
    parser = ArgumentParser(f"spar evaluate --prepare {what}", description=prepare.__doc__)
    folders = read(shipped()[next(name for name in PREPARED if PREPARED[name] == what)]).folder
    parser.add_argument("--root", type=Path, required=True, help=f"folder that contains {' or '.join(folders[:-1])}")
    if what in pascal_context.TARGETS:
        parser.add_argument("--annotations", type=Path, help="folder of the .mat files; default: trainval/ in VOC2010")
    given = parser.parse_args(rest)
    images = "images/ADE/validation" if what == "ade847" else "JPEGImages"
    candidates = [given.root / name / images for name in folders]
    found = next((path for path in candidates if path.is_dir()), None)
    if found is None:
        raise UserError(
            f"--root {given.root}: none of {', '.join(map(str, candidates))} exists. Unpack "
            f"{'the full ADE20K (2021_17_01)' if what == 'ade847' else 'VOCtrainval_03-May-2010.tar'} there."
        )
    if what == "ade847":
        folder = found.parents[2]
        written, labels = ade20k_full.convert(folder), folder / ade20k_full.LABELS
    else:
        folder, target = found.parent, pascal_context.TARGETS[what]
        labels = folder / target.labels
        written = pascal_context.convert(folder, given.annotations or folder / "trainval", target)
    print(f"{len(list(tqdm(written, 'label maps', unit='image')))} label maps written to {labels}")
    return 0
