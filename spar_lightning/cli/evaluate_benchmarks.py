"""`spar evaluate --check` and `--prepare`: check of the benchmark folders, and label maps of PASCAL Context."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from spar_lightning.errors import UserError, nearest
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.benchmark_config import SHIPPED, read, shipped
from spar_lightning.evaluation.pascal_context import LABELS, LIST, convert


def check(root: Path, rest: Sequence[str]) -> int:
    """Print the benchmarks found in a folder; return 1 if anything is missing."""
    if rest:
        raise UserError(f"--check takes a folder and no other arguments, but got {' '.join(rest)}.")
    if not root.is_dir():
        raise UserError(f"--check {root}: the folder does not exist.")
    problems = {name: _problem(name, root) for name in SHIPPED}
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
    if description.split == LIST:
        lines.append(f"  `spar evaluate --prepare context --root {root}` creates list and label maps from the download")
    return "\n".join(lines)


def prepare(what: str, rest: Sequence[str]) -> int:
    """Create the label maps of PASCAL Context from its downloaded annotations."""
    if what != "context":
        raise UserError(
            f"--prepare {what}: unknown benchmark. {nearest(what, ['context'])}Only context can be prepared."
        )
    parser = ArgumentParser("spar evaluate --prepare context", description=prepare.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder that contains VOCdevkit/VOC2010 or VOC2010")
    parser.add_argument("--annotations", type=Path, help="folder of the .mat files; default: trainval/ in VOC2010")
    given = parser.parse_args(rest)
    candidates = [given.root / name for name in read(shipped()["context60"]).folder]
    folder = next((c for c in candidates if (c / "JPEGImages").is_dir()), None)
    if folder is None:
        raise UserError(
            f"--root {given.root}: none of {', '.join(f'{c}/JPEGImages' for c in candidates)} exists. Unpack "
            "VOCtrainval_03-May-2010.tar there."
        )
    names = list(tqdm(convert(folder, given.annotations or folder / "trainval"), "label maps", unit="image"))
    print(f"{len(names)} label maps written to {folder / LABELS}, their list to {folder / LIST}")
    return 0
