"""`spar probe knn`: k-nearest-neighbor segmentation with a memory bank of training patches."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.utils.data import Dataset
from tqdm import tqdm

from spar_lightning.cli.backbone_arguments import split_backbone_arguments
from spar_lightning.cli.lightning_messages import silence
from spar_lightning.cli.parser import Parser
from spar_lightning.cli.probe_options import (
    OUT,
    add_inference,
    check_single_process,
    content,
    folder_name,
    opened,
    parsed,
    probe_parser,
)
from spar_lightning.datasets.loader import one_by_one
from spar_lightning.datasets.samples import LabelledImage
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.environment import environment
from spar_lightning.evaluation.evaluator import count
from spar_lightning.formatting import bytes_text
from spar_lightning.probes.compatible import (
    UNLABELED,
    CompatibleImages,
    check_compatible,
    compatible_result,
    has_unlabeled_class,
)
from spar_lightning.probes.encoder import PatchEncoder
from spar_lightning.probes.knn import KNN, KNNSegmenter, fill
from spar_lightning.probes.memory_bank import MemoryBank
from spar_lightning.probes.report import FILES, ProbeReport
from spar_lightning.student import load_student, usable_device

DESCRIPTION = """Segment the images of a benchmark by nearest neighbors: each patch gets the classes of the most similar
patches of training images (Hummingbird; Table 7 of the paper). Images keep their native size. Nothing is trained.

Results are stored after each seed. The same command continues with the seeds that are missing. Settings of inference
default to those of the run."""
EXAMPLES = (
    "spar probe knn --weights tiny --benchmark data/scenes/seed-0/scenes_192 --train data/scenes/seed-0/scenes_64",
    "spar probe knn --weights runs/quickstart --benchmark voc21 --root /data/benchmarks --train_fraction 0.5",
)


def parser() -> Parser:
    """Return the parser of the command."""
    parser = probe_parser("knn", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    parser.add_class_arguments(KNN)
    add("--memory_patches", type=int | None, help="Maximum number of training patches, the same number from each "
        "image; rare classes are preferred; all patches by default")  # fmt: skip
    add("--train_fraction", type=float, default=1.0, help="Fraction of the training images, drawn with each seed")
    add("--seeds", type=int, default=1, help="Number of seeds for the samples; results are averaged")
    add("--compatible", action="store_true", help="Count unlabeled pixels and absent classes as the usual open "
        "implementation does, and reassign classes; only to compare numbers with it")  # fmt: skip
    add("--device", type=str, help="Device such as cpu, cuda or cuda:1; a GPU by default, if available")
    add_inference(parser)
    return parser


def run(args: Sequence[str]) -> int:
    """Segment the images of a benchmark for each seed, and print a table."""
    silence()
    own, arguments = split_backbone_arguments(args)
    given, inference = parsed(parser(), own)
    settings = KNN(given.k, given.temperature)
    check_at_least(1, **{f"--{name}": given[name] for name in ("seeds", "memory_patches", "max_images")})
    check_at_least(0, **{"--num_workers": given.num_workers})
    if not 0 < given.train_fraction <= 1:
        raise UserError(f"--train_fraction must be above 0 and at most 1, but got {given.train_fraction}.")
    if given.train_fraction == 1 and given.memory_patches is None and given.seeds > 1:
        raise UserError("--seeds has no effect, because nothing is drawn. Set --train_fraction or --memory_patches.")
    check_single_process("knn")
    benchmark, training = opened(given)
    if given.compatible:
        check_compatible(benchmark, training)
    device = usable_device(given.device)
    student = load_student(given.weights, given.config, inference, arguments)
    encoder = PatchEncoder(student.backbone.to(device), student.config, given.features)
    fabric = Fabric(accelerator=device.type, devices=1, precision=given.precision)
    names = ("features", "k", "temperature", "memory_patches", "train_fraction", "compatible")
    chosen = {**{name: given[name] for name in names}, "precision": str(fabric.strategy.precision.precision)}
    found = content("knn", chosen, benchmark, training, encoder, student.config)
    report = ProbeReport(Path(given.out or OUT / folder_name(found)), found, environment(fabric))
    for seed in (seed for seed in range(given.seeds) if str(seed) not in report.rows):
        report.add(seed, *_result(given, benchmark, training, encoder, settings, device, fabric, seed))
    print(f"\n{report.table()}\n\n{report.folder}: {', '.join(FILES)}")
    return 0


def _result(
    given: Any,
    benchmark: Benchmark,
    training: Benchmark,
    encoder: PatchEncoder,
    settings: KNN,
    device: torch.device,
    fabric: Fabric,
    seed: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the numbers of a seed, and the IoU of each class; the memory bank is freed at the end."""
    bank, images = _bank(given, training, encoder, device, fabric, seed)
    counts = _segment(given, benchmark, KNNSegmenter(encoder, bank, settings), device, fabric, bank.classes)
    if not counts.matrix.any():
        benchmark.results(counts)  # raises: no labeled pixel
    result = compatible_result(counts) if given.compatible else counts.results()
    extra = [UNLABELED] if given.compatible and has_unlabeled_class(benchmark) else []
    numbers = {
        "mIoU": result.miou,
        "pixel accuracy": result.accuracy,
        "images": result.images,
        "training images": images,
        "training patches": bank.patches,
    }
    return numbers, dict(zip([*extra, *benchmark.classes], result.per_class, strict=True))


def _bank(
    given: Any, training: Benchmark, encoder: PatchEncoder, device: torch.device, fabric: Fabric, seed: int
) -> tuple[MemoryBank, int]:
    """Return the memory bank of a seed, and the number of its training images."""
    generator = torch.Generator().manual_seed(seed)
    number = max(1, round(given.train_fraction * len(training)))
    chosen = torch.randperm(len(training), generator=generator)[:number].sort().values.tolist()
    per_image = None
    if given.memory_patches is not None:
        per_image = given.memory_patches // number
        if not per_image:
            raise UserError(
                f"--memory_patches {given.memory_patches} is less than one patch for each of {number} training images. "
                "Use more patches, or a smaller --train_fraction."
            )
    patch = encoder.backbone.patch_size
    grids = (training.image_size(i) for i in chosen)
    patches = [-(-height // patch) * -(-width // patch) for height, width in grids]
    capacity = sum(min(n, per_image or n) for n in patches)
    classes = len(training.classes) + (given.compatible and has_unlabeled_class(training))
    place = _place(MemoryBank.bytes_of(capacity, encoder.width, classes), device)
    bank = MemoryBank(capacity, encoder.width, classes, place)
    images: Dataset[LabelledImage] = CompatibleImages(training, True) if given.compatible else training
    loaded = chain.from_iterable(one_by_one(images, given.num_workers, chosen))
    steps = fill(bank, encoder, loaded, per_image, generator)
    with fabric.autocast():
        for _ in tqdm(steps, f"memory bank (seed {seed})", number, unit="image"):
            pass
    return bank, number


def _place(size: int, device: torch.device) -> torch.device:
    """Return the device of a memory bank: that of the network if there is space, otherwise the CPU.

    Raises:
        UserError: If the bank fits neither there nor into the memory of the machine.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if 2 * size < torch.cuda.mem_get_info(device)[0]:
            return device
    available = available_memory()
    if available is not None and size > available:
        raise UserError(
            f"The memory bank needs {bytes_text(size)}, but {bytes_text(available)} of memory are available. Set "
            "--memory_patches or --train_fraction."
        )
    return torch.device("cpu")


def available_memory() -> int | None:
    """Return the memory in bytes that this process can still use, or None if the system does not say.

    In a container or a SLURM job, that is what its control group (version 2) leaves.
    """
    found = []
    lines = _read(Path("/proc/meminfo")).splitlines()
    found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    own = _read(Path("/proc/self/cgroup")).strip().rpartition(":")[2].lstrip("/")
    for folder in (Path("/sys/fs/cgroup") / own, Path("/sys/fs/cgroup")):
        limit, used = (_read(folder / name).strip() for name in ("memory.max", "memory.current"))
        if limit.isdecimal() and used.isdecimal():
            found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _segment(
    given: Any, benchmark: Benchmark, segmenter: KNNSegmenter, device: torch.device, fabric: Fabric, classes: int
) -> ConfusionMatrix:
    """Return the confusion matrix of all images of a benchmark."""
    counts = ConfusionMatrix(classes, device)
    indices = list(range(len(benchmark)))
    images: Dataset[LabelledImage] = CompatibleImages(benchmark, False) if given.compatible else benchmark
    loaded = chain.from_iterable(one_by_one(images, given.num_workers))
    steps = count(segmenter, loaded, indices, counts, device, fabric.autocast)
    for _ in tqdm(steps, benchmark.name, len(benchmark), unit="image"):
        pass
    return counts
