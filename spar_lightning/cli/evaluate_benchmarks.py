"""`spar evaluate --check` and `--prepare`: are the benchmarks where they should be, and PASCAL Context's labels."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from spar_lightning.errors import UserError, nearest
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.benchmark_config import SHIPPED, BenchmarkError, read, shipped
from spar_lightning.evaluation.pascal_context import LABELS, LIST, convert


def check(root: Path, rest: Sequence[str]) -> int:
    """Say of every benchmark what is found below a folder; 1 if something is missing."""
    if rest:
        raise UserError(f"--check takes a folder and nothing more, but got {' '.join(rest)}.")
    if not root.is_dir():
        raise UserError(f"--check {root}: there is no such folder.")
    problems = {name: _problem(name, root) for name in SHIPPED}
    if any(problems.values()):
        print("\nWhere they should lie; of several places the first that exists is taken:")
    for name in (name for name, problem in problems.items() if problem):
        print(f"{name}\n{_layout(name, root)}")
    return int(any(problems.values()))


def _problem(name: str, root: Path) -> bool:
    """Print one line, and whether something is missing."""
    benchmark = Benchmark(name, str(root))
    try:
        benchmark.open()
    except BenchmarkError as error:
        print(f"{name:<11} {str(error).removeprefix(f'{name} ').split(' `spar evaluate')[0]}")
        return True
    no_image = [stem for i, stem in enumerate(benchmark.stems) if not benchmark.has_image(i)]
    no_labels = [stem for stem in benchmark.stems if not benchmark.has_labels(stem)]
    count = len(benchmark)
    images, labels = count - len(no_image), count - len(no_labels)
    print(f"{name:<11} {images} of {count} images, {labels} of {count} label maps in {benchmark.folder}")
    for stems, what in ((no_image, "image"), (no_labels, "label map")):
        if stems:
            print(f"{'':<11} the first without {what}: {stems[0]}")
    expected = benchmark.description.expected_images
    if expected not in (None, count):
        print(f"{'':<11} there should be {expected} images")
    return bool(no_image or no_labels or expected not in (None, count))


def _layout(name: str, root: Path) -> str:
    description = read(shipped()[name])
    folders = description.folder
    parts = [*description.images, *(f"{kind.file}" for kind in description.labels)]
    lines = [f"  {root / folders[0]}/{part.replace('{}', 'NAME')}" for part in parts]
    if description.split:
        lines.append(f"  {root / folders[0]}/{description.split}")
    lines.append(f"  or the same below {' or '.join(str(root / folder) for folder in folders[1:])}")
    if description.split == LIST:
        lines.append(f"  `spar evaluate --prepare context --root {root}` makes list and label maps from the download")
    return "\n".join(lines)


def prepare(what: str, rest: Sequence[str]) -> int:
    """Make the label maps of PASCAL Context from its download."""
    if what != "context":
        raise UserError(
            f"--prepare {what}: there is nothing to prepare. {nearest(what, ['context'])}Allowed is context."
        )
    parser = ArgumentParser("spar evaluate --prepare context", description=prepare.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder above VOCdevkit/VOC2010 or VOC2010")
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
    print(f"{len(names)} label maps in {folder / LABELS}, their list in {folder / LIST}")
    return 0
