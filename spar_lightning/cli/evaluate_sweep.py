"""`spar evaluate --strides` and `--sweep`: measurements for Figures 1 and 3 of the paper.

A sweep measures the configured network (with sliding windows: the teacher) and the students of `--weights` in a single
pass. Each point is a separate evaluation in points/, with its timing. A stopped sweep therefore continues where it
stopped, and a sweep with additional points measures only those.
"""

import copy
import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.checkpoints import load_weights
from spar_lightning.backbones.weights import SUFFIXES
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.environment import environment
from spar_lightning.evaluation.evaluator import Evaluator
from spar_lightning.evaluation.report import Report
from spar_lightning.evaluation.sweep_report import Figure, SweepReport, draw, tails
from spar_lightning.evaluation.timing import Timing
from spar_lightning.files.atomic import replace_json
from spar_lightning.files.hashing import hash_json
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.text_embeddings import TextClassifiers
from spar_lightning.sliding_window import SlidingWindow


class Sweep:
    """Sweep over strides (Figure 1) and image sizes (Figure 3) for one or more networks.

    Args:
        evaluator: Evaluator of the benchmarks.
        strides: Strides of the sliding window in pixels; empty to skip Figure 1.
        areas: Image areas, each given as the side of a square in pixels; empty to skip Figure 3.
        warm_ups: Number of forward passes before the timed ones.
        repeats: Number of timed forward passes.
    """

    def __init__(self, evaluator: Evaluator, strides: list[int], areas: list[int], warm_ups: int, repeats: int) -> None:
        self._evaluator = evaluator
        self._strides, self._areas = strides, areas
        self._passes = {"warm_ups": warm_ups, "repeats": repeats}

    def run(
        self, backbone: Backbone, config: InferenceConfig, weights: Sequence[str], parent: Path, folder: Path | None
    ) -> None:
        """Measure all points and draw the figures. With inference `sliding`, Figure 3 includes the teacher.

        Args:
            backbone: Network on the evaluator's device; the weights of each student are loaded into it.
            config: Inference settings; each point sets its own inference mode and stride.
            weights: Weights of the students, in the format of `--weights`.
            parent: Folder in which the sweep's folder, named after network and protocol, is created.
            folder: Folder of the sweep, instead of one in `parent`.

        Raises:
            UserError: A stride or weight file is invalid, or the folder contains another sweep.
        """
        for stride in self._strides:  # report invalid input before any measurement
            SlidingWindow(backbone, stride)
        for source in weights:
            load_weights(copy.deepcopy(backbone), source)
        identity = self._identity(backbone, config)
        self._folder = folder or parent / f"{type(backbone).__name__}-sweep-{hash_json(list(identity.values()), 12)}"
        self._report = SweepReport(self._folder, identity, environment(self._evaluator.fabric))
        self._classifiers = TextClassifiers(backbone, config.templates)
        name = type(backbone).__name__
        names = network_names([name, *weights])
        self._single_pass(backbone, config, name)
        for stride in self._strides:
            sliding = replace(config, inference="sliding", stride=stride)
            self._point("strides", backbone, sliding, f"{name}, sliding window", None)
        for area in self._areas if config.inference == "sliding" else ():
            self._point("areas", backbone, config, f"{name}, sliding window", area)
        for source in weights:
            load_weights(backbone, source)
            self._single_pass(backbone, config, names[source])
        if self._evaluator.fabric.is_global_zero:
            print(f"\n{self._report.finish()}\n\n{self._folder}: sweep.json, sweep.md, points/, figures")

    def _identity(self, backbone: Backbone, config: InferenceConfig) -> dict[str, Any]:
        """Return the settings that all points share: network, protocol and benchmarks."""
        protocol = self._evaluator.protocol(backbone, replace(config, inference="single"))  # with the attention
        common = {key: value for key, value in protocol.content().items() if key not in ("inference", "stride")}
        if config.blend != "mean":
            common["blend"] = config.blend  # of the sliding windows
        benchmarks = {benchmark.name: len(benchmark) for benchmark in self._evaluator.benchmarks}
        return {"network": protocol.model(), "protocol": common, "benchmarks": benchmarks}

    def _single_pass(self, backbone: Backbone, config: InferenceConfig, name: str) -> None:
        """Measure all single-pass points of a network."""
        single = replace(config, inference="single")
        name += "" if config.windowed is None else ", windowed attention"
        if self._strides:
            self._point("strides", backbone, single, f"{name}, single pass", None)
        for area in self._areas:
            self._point("areas", backbone, single, f"{name}, single pass", area)

    def _point(self, figure: Figure, backbone: Backbone, config: InferenceConfig, curve: str, area: int | None) -> None:
        """Evaluate one point and measure its time on the first rank."""
        fabric = self._evaluator.fabric
        stride = config.stride if config.inference == "sliding" else None
        place = [*([f"stride {stride}"] if stride else []), *([f"area {area}²"] if area else [])]
        self._evaluator.say("\n" + ", ".join([curve, *place]))
        results = self._evaluator.run(backbone, config, self._classifiers, self._folder / "points", area=area)
        if fabric.is_global_zero:
            scores = results.content["benchmarks"]
            timings = self._timings(backbone, config, results, area)
            point = {"figure": figure, "curve": curve, "stride": stride, "area": area, "window": backbone.window}
            protocol = results.content["protocol"]
            miou = {name: scores[name]["mIoU"] for name in timings}
            facts = ("images", "images_sha256", "names_sha256")
            images = {name: {key: scores[name]["protocol"][key] for key in facts} for name in timings}
            self._report.add({**point, "protocol": protocol, "images": images, "mIoU": miou, "timings": timings})
        fabric.barrier()

    def _timings(
        self, backbone: Backbone, config: InferenceConfig, results: Report, area: int | None
    ) -> dict[str, dict[str, Any]]:
        """Return the timing on the first image of each benchmark; reuse earlier timings of the same hardware."""
        fabric, path = self._evaluator.fabric, results.folder / "timings.json"
        known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        found = {}
        for whole in self._evaluator.benchmarks:
            benchmark = whole if area is None else whole.resized(area)
            protocol = results.content["benchmarks"][benchmark.name]["protocol"]
            key = f"{benchmark.name}-{hash_json([protocol, results.content['environment'], self._passes], 12)}"
            if key not in known:
                segmenter = benchmark.description.segmenter(backbone, config, self._classifiers)
                image = benchmark[0].image.to(fabric.device)
                known[key] = asdict(Timing.of(segmenter, image, fabric.autocast, **self._passes))
                replace_json(path, known, results.folder / "counts" / "tmp")
            found[benchmark.name] = known[key]
        return found


def network_names(networks: Sequence[str]) -> dict[str, str]:
    """Return the name of each network in the figures: name of the run or file, with more of its path if ambiguous."""
    short = {network: _short(network) for network in networks}
    twice = [network for network, name in short.items() if list(short.values()).count(name) > 1]
    longer = tails([Path(network) for network in twice]) if twice else {}
    return {**short, **{network: longer[Path(network)] for network in twice}}


def _short(network: str) -> str:
    """Return the name of a run, file or backbone without its folders."""
    path = Path(network)
    if path.parent.name == "checkpoints":
        return path.parent.parent.name
    return path.stem if path.suffix in SUFFIXES else path.name


def check_folder(out: Path) -> None:
    """Raise UserError if `out` is a file."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Pass a folder.")


def numbers(option: str, text: str | None) -> list[int]:
    """Parse positive integers separated by commas, such as "64,32,16"; None gives an empty list.

    Raises:
        UserError: `text` is not a list of integers, or one of them is below 1.
    """
    try:
        found = [int(part) for part in text.split(",")] if text is not None else []
    except ValueError as error:
        raise UserError(f"{option} takes integers separated by commas, such as 64,32,16, but got {text!r}.") from error
    for number in found:
        check_at_least(1, **{option: number})
    return list(dict.fromkeys(found))


def figures(folders: Sequence[Path], rest: Sequence[str]) -> int:
    """Draw several sweeps in the same figures."""
    parser = ArgumentParser("spar evaluate --figures", description=figures.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    out = parser.parse_args(rest).out
    check_folder(out)
    print("\n".join(str(path) for path in draw(folders, out)))
    return 0
