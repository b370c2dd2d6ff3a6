"""`spar probe panoptic`: panoptic segmentation with the masks of the ground truth and predicted classes."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor
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
    opened_benchmark,
    parsed,
    probe_parser,
)
from spar_lightning.datasets.loader import one_by_one
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.environment import environment
from spar_lightning.evaluation.panoptic_quality import PanopticQuality
from spar_lightning.evaluation.segments import Segments, is_thing, read_segments
from spar_lightning.probes.encoder import PatchEncoder
from spar_lightning.probes.mask_pooling import Pooling, areas, pooled
from spar_lightning.probes.report import FILES, ProbeReport
from spar_lightning.segmentation.prompts import TextClassifier
from spar_lightning.segmentation.text_embeddings import text_classifier
from spar_lightning.student import load_student, usable_device

DESCRIPTION = """Classify the segments of the ground truth by their mean dense feature and the text embeddings of the
class names, and measure panoptic quality (Table 8 of the paper): PQ, SQ and RQ over all classes, things and stuff.

Instance maps: those of Cityscapes are part of its download, those of ADE20K are annotations_instance.tar. Settings of
inference default to those of the run."""
EXAMPLES = (
    "spar probe panoptic --weights runs/siglip2_vitb16 --benchmark cityscapes --root /data/benchmarks",
    "spar probe panoptic --weights runs/siglip2_vitb16 --benchmark ade20k --root /data/benchmarks --size 512,800",
)


class SegmentedImages(Dataset[tuple[Tensor, Segments]]):
    """Images (3, H, W) uint8 of a benchmark with their segments.

    Args:
        benchmark: Opened benchmark.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        self._benchmark = benchmark

    def __len__(self) -> int:
        return len(self._benchmark)

    def __getitem__(self, index: int) -> tuple[Tensor, Segments]:
        image = self._benchmark[index]
        return image.image, read_segments(self._benchmark, index, image.labels)


def parser() -> Parser:
    """Return the parser of the command."""
    parser = probe_parser("panoptic", DESCRIPTION, EXAMPLES, trained=False)
    add = parser.add_argument
    add("--size", type=str, default="native", help="Sides of the square to which images are resized, in pixels, "
        "separated by commas, one result for each; native keeps the size")  # fmt: skip
    add("--pooling", type=Pooling, default="area", help="`area`: a patch counts by the fraction that a segment covers. "
        "`binary`: resized masks, as in FC-CLIP, in which small segments can vanish")  # fmt: skip
    add("--device", type=str, help="Device such as cpu, cuda or cuda:1; a GPU by default, if available")
    add_inference(parser, "templates")
    return parser


def run(args: Sequence[str]) -> int:
    """Classify the segments of a benchmark at each size, and print a table."""
    silence()
    own, arguments = split_backbone_arguments(args)
    given, inference = parsed(parser(), own)
    check_at_least(1, **{"--max_images": given.max_images})
    check_at_least(0, **{"--num_workers": given.num_workers})
    check_single_process("panoptic")
    sizes = _sizes(given.size)
    benchmark = opened_benchmark(given)
    device = usable_device(given.device)
    student = load_student(given.weights, given.config, inference, arguments)
    encoder = PatchEncoder(student.backbone.to(device), student.config, "dense")
    classifier = text_classifier(student.backbone, benchmark.classes, student.config.templates).to(device)
    fabric = Fabric(accelerator=device.type, devices=1, precision=given.precision)
    settings = {"pooling": given.pooling, "precision": str(fabric.strategy.precision.precision)}
    found = content("panoptic", settings, benchmark, None, encoder, student.config)
    report = ProbeReport(Path(given.out or OUT / folder_name(found)), found, environment(fabric), row="size")
    for size in (size for size in sizes if size not in report.rows):
        quality = PanopticQuality(is_thing(benchmark))
        loaded = chain.from_iterable(one_by_one(SegmentedImages(benchmark), given.num_workers))
        for image, segments in tqdm(loaded, f"size {size}", len(benchmark), unit="image"):
            with fabric.autocast():
                features = encoder(_resized(image.to(device), size))
            predicted = classify(features, segments, classifier, given.pooling)
            quality.update(areas(segments.ids, len(segments.classes)), segments.classes, predicted.cpu())
        if not quality.true.any():
            raise UserError(f"{benchmark.name}: its {quality.images} images have no segments. Check its label maps.")
        numbers = {**quality.results(), "images": quality.images, "segments": int(quality.true.sum())}
        report.add(size, numbers, dict(zip(benchmark.classes, quality.per_class()["PQ"].tolist(), strict=True)))
    print(f"\n{report.table()}\n\n{report.folder}: {', '.join(FILES)}")
    return 0


def classify(features: Tensor, segments: Segments, classifier: TextClassifier, pooling: Pooling) -> Tensor:
    """Return the class (S) of each segment: the one with the most similar name.

    Args:
        features: Dense features (h, w, d).
        segments: Segments of the image.
        classifier: Class names, on the device of the features.
        pooling: How features are averaged, see `probes.mask_pooling.pooled`.
    """
    means = pooled(features, segments.ids.to(features.device), len(segments.classes), pooling)
    similarities = F.normalize(means, dim=-1) @ classifier.embeddings.to(means).T  # (S, Q)
    return classifier.owner[similarities.argmax(1)]


def _sizes(given: str) -> list[str]:
    """Return the sizes as text.

    Raises:
        UserError: A size is neither a number nor native.
    """
    sizes = [part.strip() for part in given.split(",")]
    if wrong := [size for size in sizes if size != "native" and not (size.isdecimal() and int(size) > 0)]:
        raise UserError(f"--size must be native or numbers of pixels such as 512,800, but got {wrong[0]!r}.")
    return list(dict.fromkeys(sizes))


def _resized(image: Tensor, size: str) -> Tensor:
    """Return an image (3, H, W) uint8 resized to a square (bilinear, with antialiasing)."""
    if size == "native":
        return image
    square = (int(size), int(size))
    return F.interpolate(image[None].cpu(), square, mode="bilinear", antialias=True)[0].to(image.device)
