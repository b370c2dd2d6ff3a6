"""Time several implementations in alternation, so that machine noise affects all of them equally."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from spar_lightning.evaluation.timing import Peak, now
from spar_lightning.formatting import markdown


@dataclass(frozen=True)
class Way:
    """Implementation of the work that is timed.

    Args:
        run: Function that does the work once.
        operations: Floating point operations of the network per run; 0 if not counted.
        peak: Peak operations per second of the device in the precision of this implementation; 0 if not measured.
    """

    run: Callable[[], object]
    operations: float = 0.0
    peak: float = 0.0


@dataclass
class Times:
    """Wall and CPU time of each repeat in seconds, in order, and peak memory over all repeats in MiB."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: float | None = None

    def quartiles(self) -> tuple[float, float, float]:
        """Return the first quartile, the median and the third quartile of the wall time."""
        if len(self.wall) < 2:
            return (self.wall[0],) * 3
        first, median, third = statistics.quantiles(self.wall, n=4, method="inclusive")
        return first, median, third


class Comparison:
    """Comparison of implementations of the same work. The first implementation is the baseline.

    Args:
        title: Description of the work.
        unit: Unit of work, such as windows.
        count: Number of units per run.
        ways: Implementations by name.
        overhead: Names of an implementation and of a second one that does only the unavoidable part of the work. The
            time of the first is reported relative to the second.
    """

    def __init__(
        self, title: str, unit: str, count: float, ways: Mapping[str, Way], overhead: tuple[str, str] | None = None
    ) -> None:
        self.title, self.unit, self.count, self.ways = title, unit, count, ways
        self.overhead = overhead
        self.times: dict[str, Times] = {}

    def measure(self, repeats: int, device: torch.device) -> "Comparison":
        """Run every implementation once to warm up, then each once per repeat, in rotating order."""
        names = list(self.ways)
        self.times = {name: Times() for name in names}
        for turn in range(repeats + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                self._run(name, device, counts=turn > 0)
        return self

    def _run(self, name: str, device: torch.device, counts: bool) -> None:
        way, times = self.ways[name], self.times[name]
        peak, start, cpu = Peak(device), now(device), time.process_time()
        way.run()
        wall, cpu = now(device) - start, time.process_time() - cpu
        if counts:
            times.wall.append(wall)
            times.cpu.append(cpu)
            memory = peak.mebibytes()
            times.memory = max(times.memory or 0.0, memory) if memory is not None else None

    def ratios(self, name: str, to: str | None = None) -> tuple[float, float, float]:
        """Return the speed-up over another implementation, by default the first: median, minimum and maximum."""
        base = self.times[to or next(iter(self.ways))].wall
        each = [a / b for a, b in zip(base, self.times[name].wall, strict=True)]
        return statistics.median(each), min(each), max(each)

    def rows(self) -> list[dict[str, Any]]:
        """Return the results of each implementation."""
        return [self._row(name, way) for name, way in self.ways.items()]

    def _row(self, name: str, way: Way) -> dict[str, Any]:
        times, (first, median, third) = self.times[name], self.times[name].quartiles()
        rate = way.operations / median
        return {
            "work": self.title,
            "way": name,
            "unit": self.unit,
            "per_second": self.count / median,
            "ms": 1000 * median / self.count,
            "ms_quartiles": [1000 * first / self.count, 1000 * third / self.count],
            "cpu_ms": 1000 * statistics.median(times.cpu) / self.count,
            "tflops": rate / 1e12 or None,
            "share_of_peak": rate / way.peak if way.peak else None,
            "times_as_fast": list(self.ratios(name)),
            "overhead": self._overhead() if self.overhead and name == self.overhead[0] else None,
            "peak_memory_mib": times.memory,
            "repeats": len(times.wall),
        }

    def _overhead(self) -> list[float]:
        """Return the overhead as a fraction of the unavoidable time: median, minimum and maximum over the repeats."""
        assert self.overhead is not None
        median, least, greatest = (1 / ratio - 1 for ratio in self.ratios(*self.overhead))
        return [median, greatest, least]

    def table(self) -> str:
        """Return the results as a Markdown table, followed by the overhead if it is measured."""
        unit = self.unit.rstrip("s")
        head = [self.title, f"{self.unit}/s", f"ms per {unit}", "CPU ms", "TFLOP/s", "of peak", "speed-up", "MiB"]
        lines = [head]
        for row in self.rows():
            low, high = row["ms_quartiles"]
            median, least, greatest = row["times_as_fast"]
            lines.append([
                row["way"], f"{row['per_second']:.3g}", f"{row['ms']:.4g} ({low:.4g} to {high:.4g})",
                f"{row['cpu_ms']:.4g}", f"{row['tflops']:.3g}" if row["tflops"] else "",
                f"{row['share_of_peak']:.0%}" if row["share_of_peak"] else "",
                f"{median:.2f} ({least:.2f} to {greatest:.2f})",
                f"{row['peak_memory_mib']:,.0f}" if row["peak_memory_mib"] else "",
            ])  # fmt: skip
        if self.overhead is None:
            return markdown(lines)
        median, least, greatest = self._overhead()
        way, bare = self.overhead
        return f"{markdown(lines)}\n{way}: {median:+.1%} over {bare} ({least:+.1%} to {greatest:+.1%})"
