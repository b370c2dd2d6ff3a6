"""`spar evaluate --strides` and `--sweep`: the paper's Figures 1 and 3.

The network as it is configured, which is the teacher where it slides, and the students of `--weights` in a
single pass. Every point is an evaluation of its own, so that a stopped sweep goes on where it was.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from spar_lightning.cli.measurement import Measurement
from spar_lightning.cli.student_weights import load
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.protocol import digest
from spar_lightning.evaluation.sweep_report import Figure, SweepReport, draw, plain
from spar_lightning.evaluation.timing import Timing
from spar_lightning.sliding_window import SlidingWindow


class Sweep:
    """Points of the figures, network after network.

    Args:
        measurement: Benchmarks and processes.
        folder: Of the results.
        strides: Of the sliding window in pixels, for Figure 1; empty: not that figure.
        areas: Sides of squares whose area the images get, in pixels, for Figure 3; empty: not that figure.
        warm_ups: Forward passes that are not timed.
        repeats: Forward passes that are.
    """

    def __init__(
        self, measurement: Measurement, folder: Path, strides: list[int], areas: list[int], warm_ups: int, repeats: int
    ) -> None:
        self._measurement = measurement
        self._folder = folder
        self._strides, self._areas = strides, areas
        self._warm_ups, self._repeats = warm_ups, repeats

    def run(self, model: Distillation, weights: Sequence[str]) -> None:
        """Measure all points and draw; where model.inference is `sliding`, Figure 3 has the teacher too."""
        for stride in self._strides:
            SlidingWindow(model.student, stride)  # refuses a bad one now, not after the others
        self._report: SweepReport | None = None
        windows_by_area = model.inference == "sliding"
        stride, backbone = model.stride, type(model.student).__name__
        model.inference = "single"
        self._single_pass(model, backbone)
        model.inference = "sliding"
        for model.stride in self._strides:
            self._point("strides", model, f"{backbone}, sliding window", None)
        model.stride = stride
        for area in self._areas if windows_by_area else ():
            self._point("areas", model, f"{backbone}, sliding window", area)
        model.inference = "single"
        for source in weights:
            load(model, source)
            self._single_pass(model, network_name(source, weights))
        if self._report is not None:
            print(f"\n{self._report.finish()}\n\n{self._folder}: sweep.json, table.md, points/, figures")

    def _single_pass(self, model: Distillation, name: str) -> None:
        if self._strides:
            self._point("strides", model, f"{name}, single pass", None)
        for area in self._areas:
            self._point("areas", model, f"{name}, single pass", area)

    def _point(self, figure: Figure, model: Distillation, curve: str, area: int | None) -> None:
        """Evaluate, and on the first process take the time."""
        fabric = self._measurement.fabric
        self._measurement.say(f"\n{curve}, {f'area {area}²' if area else f'stride {model.stride}'}")
        results = self._measurement.run(model, self._folder / "points", area=area)
        if fabric.is_global_zero:
            self._report = self._report or SweepReport(self._folder, results.content["environment"])
            names = [benchmark.name for benchmark in self._measurement.benchmarks]
            settings = [results.folder.name, names, results.content["environment"], self._warm_ups, self._repeats]
            key = f"{figure}-{digest([curve, *settings])}"
            timings = self._report.timings(key) or self._time(model, area)
            stride = model.stride if model.inference == "sliding" else None
            point = {"key": key, "curve": curve, "stride": stride, "area": area, "window": model.student.window}
            miou = {name: results.content["benchmarks"][name]["mIoU"] for name in names}
            self._report.add(figure, point, miou, timings)
        fabric.barrier()

    def _time(self, model: Distillation, area: int | None) -> dict[str, dict[str, object]]:
        """The network alone on the first image of every benchmark."""
        fabric, timings = self._measurement.fabric, {}
        for benchmark in self._measurement.benchmarks:
            at_size = benchmark if area is None else benchmark.resized(area)
            image = benchmark[0].image.to(fabric.device)
            segmenter = model.segmenter(at_size.description)
            timing = Timing.of(segmenter, image, fabric.autocast, self._warm_ups, self._repeats)
            timings[benchmark.name] = plain(timing)
        return timings


def network_name(source: str, weights: Sequence[str]) -> str:
    """How a figure calls the network of a run or file: by its last name, where that tells it from the others."""

    def short(path: str) -> str:
        parts = Path(path)
        return parts.parent.parent.name if parts.parent.name == "checkpoints" else parts.stem

    return short(source) if sum(short(other) == short(source) for other in weights) == 1 else source


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
    print("\n".join(str(path) for path in draw(folders, out)))
    return 0
