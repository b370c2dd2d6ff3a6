"""`spar evaluate --strides` and `--sweep`: the paper's Figures 1 and 3.

The network as it is configured, which is the teacher where it slides, and the students of `--weights` in a
single pass. Every point is an evaluation of its own below points/, with its timing: a stopped sweep goes on where
it was, and one with further points measures these alone.
"""

import copy
import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spar_lightning.backbones.weights import SUFFIXES
from spar_lightning.cli.measurement import Measurement
from spar_lightning.datamodules.durable import replace
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.environment import environment
from spar_lightning.evaluation.protocol import digest
from spar_lightning.evaluation.report import Report
from spar_lightning.evaluation.sweep_report import Figure, SweepReport, draw, tails
from spar_lightning.evaluation.timing import Timing
from spar_lightning.sliding_window import SlidingWindow
from spar_lightning.student_weights import load


class Sweep:
    """Points of the figures, network after network.

    Args:
        measurement: Benchmarks and processes.
        strides: Of the sliding window in pixels, for Figure 1; empty: not that figure.
        areas: Sides of squares whose area the images get, in pixels, for Figure 3; empty: not that figure.
        warm_ups: Forward passes that are not timed.
        repeats: Forward passes that are.
    """

    def __init__(
        self, measurement: Measurement, strides: list[int], areas: list[int], warm_ups: int, repeats: int
    ) -> None:
        self._measurement = measurement
        self._strides, self._areas = strides, areas
        self._passes = {"warm_ups": warm_ups, "repeats": repeats}

    def run(self, model: Distillation, weights: Sequence[str], parent: Path, folder: Path | None) -> None:
        """Measure all points and draw; where model.inference is `sliding`, Figure 3 has the teacher too.

        Args:
            model: On the device.
            weights: Students, by what `--weights` takes.
            parent: Where the folder lies that is named after network and protocol.
            folder: Another than that.
        """
        for stride in self._strides:  # what is refused is refused now, not after the others
            SlidingWindow(model.student, stride)
        for source in weights:
            load(copy.deepcopy(model.student), source)
        identity = self._identity(model)
        self._folder = folder or parent / f"{type(model.student).__name__}-sweep-{digest(list(identity.values()))}"
        self._report = SweepReport(self._folder, identity, environment(self._measurement.fabric))
        windows_by_area, stride = model.inference == "sliding", model.stride
        backbone = type(model.student).__name__
        names = network_names([backbone, *weights])
        self._single_pass(model, backbone)
        model.inference = "sliding"
        for model.stride in self._strides:
            self._point("strides", model, f"{backbone}, sliding window", None)
        model.stride = stride
        for area in self._areas if windows_by_area else ():
            self._point("areas", model, f"{backbone}, sliding window", area)
        for source in weights:
            load(model.student, source)
            self._single_pass(model, names[source])
        if self._measurement.fabric.is_global_zero:
            print(f"\n{self._report.finish()}\n\n{self._folder}: sweep.json, sweep.md, points/, figures")

    def _identity(self, model: Distillation) -> dict[str, Any]:
        """What all points have in common."""
        protocol = self._measurement.protocol(model)
        common = {key: value for key, value in protocol.content().items() if key not in ("inference", "stride")}
        benchmarks = {benchmark.name: len(benchmark) for benchmark in self._measurement.benchmarks}
        return {"network": protocol.model(), "protocol": common, "benchmarks": benchmarks}

    def _single_pass(self, model: Distillation, name: str) -> None:
        model.inference = "single"
        if self._strides:
            self._point("strides", model, f"{name}, single pass", None)
        for area in self._areas:
            self._point("areas", model, f"{name}, single pass", area)

    def _point(self, figure: Figure, model: Distillation, curve: str, area: int | None) -> None:
        """Evaluate, and on the first process take the time."""
        fabric = self._measurement.fabric
        stride = model.stride if model.inference == "sliding" else None
        place = [*([f"stride {stride}"] if stride else []), *([f"area {area}²"] if area else [])]
        self._measurement.say("\n" + ", ".join([curve, *place]))
        results = self._measurement.run(model, self._folder / "points", area=area)
        if fabric.is_global_zero:
            scores = results.content["benchmarks"]
            timings = self._timings(model, results, area)
            point = {"figure": figure, "curve": curve, "stride": stride, "area": area, "window": model.student.window}
            protocol = results.content["protocol"]
            miou = {name: scores[name]["mIoU"] for name in timings}
            facts = ("images", "images_sha256", "names_sha256")
            images = {name: {key: scores[name]["protocol"][key] for key in facts} for name in timings}
            self._report.add({**point, "protocol": protocol, "images": images, "mIoU": miou, "timings": timings})
        fabric.barrier()

    def _timings(self, model: Distillation, results: Report, area: int | None) -> dict[str, dict[str, Any]]:
        """The network alone on the first image of every benchmark; from disk where the same hardware was timed."""
        fabric, path = self._measurement.fabric, results.folder / "timings.json"
        known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        found = {}
        for whole in self._measurement.benchmarks:
            benchmark = whole if area is None else whole.resized(area)
            protocol = results.content["benchmarks"][benchmark.name]["protocol"]
            key = f"{benchmark.name}-{digest([protocol, results.content['environment'], self._passes])}"
            if key not in known:
                segmenter = model.segmenter(benchmark.description)
                image = benchmark[0].image.to(fabric.device)
                known[key] = asdict(Timing.of(segmenter, image, fabric.autocast, **self._passes))
                replace(path, f"{json.dumps(known, indent=2)}\n".encode(), results.folder / "counts" / "tmp")
            found[benchmark.name] = known[key]
        return found


def network_names(networks: Sequence[str]) -> dict[str, str]:
    """How a figure calls each: a run or file by its last name, where that tells it from the others."""
    short = {network: _short(network) for network in networks}
    twice = [network for network, name in short.items() if list(short.values()).count(name) > 1]
    longer = tails([Path(network) for network in twice]) if twice else {}
    return {**short, **{network: longer[Path(network)] for network in twice}}


def _short(network: str) -> str:
    path = Path(network)
    if path.parent.name == "checkpoints":
        return path.parent.parent.name
    return path.stem if path.suffix in SUFFIXES else path.name


def check_folder(out: Path) -> None:
    """Raise UserError if results cannot lie there."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder.")


def numbers(option: str, text: str | None) -> list[int]:
    """Whole numbers with commas between.

    Raises:
        UserError: They are none.
    """
    try:
        found = [int(part) for part in text.split(",")] if text is not None else []
    except ValueError as error:
        raise UserError(f"{option} takes numbers with commas between, such as 64,32,16, but got {text!r}.") from error
    for number in found:
        check_at_least(1, **{option: number})
    return list(dict.fromkeys(found))


def figures(folders: Sequence[Path], rest: Sequence[str]) -> int:
    """Draw the figures of several sweeps as one."""
    parser = ArgumentParser("spar evaluate --figures", description=figures.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    out = parser.parse_args(rest).out
    check_folder(out)
    print("\n".join(str(path) for path in draw(folders, out)))
    return 0
