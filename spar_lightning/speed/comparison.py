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
    """One way to do the work.

    Args:
        run: Does all of it once.
        operations: Floating point operations of the network in it; 0 where that says nothing.
        peak: Operations per second that the device reaches in this way's precision.
    """

    run: Callable[[], object]
    operations: float = 0.0
    peak: float = 0.0


@dataclass
class Times:
    """Seconds of each repeat, in order, and the peak memory of all."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: float | None = None

    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median, third quartile of the wall time."""
        if len(self.wall) < 2:
            return (self.wall[0],) * 3
        first, median, third = statistics.quantiles(self.wall, n=4, method="inclusive")
        return first, median, third


class Comparison:
    """Ways to do the same work; the first is what the others are compared with.

    Args:
        title: What is done.
        unit: What is counted, such as windows.
        count: How many of them one run does.
        ways: By name.
        overhead: A way, and the one that does nothing but what cannot be left out.
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
        """Return the speed-up over another implementation, by default the first: median, least and greatest repeat."""
        base = self.times[to or next(iter(self.ways))].wall
        each = [a / b for a, b in zip(base, self.times[name].wall, strict=True)]
        return statistics.median(each), min(each), max(each)

    def rows(self) -> list[dict[str, Any]]:
        """Numbers of every way."""
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
        """Share of time above the bare work: median, least and greatest of the repeats."""
        assert self.overhead is not None
        median, least, greatest = (1 / ratio - 1 for ratio in self.ratios(*self.overhead))
        return [median, greatest, least]

    def table(self) -> str:
        """The rows for people."""
        unit = self.unit.rstrip("s")
        head = [self.title, f"{self.unit}/s", f"ms per {unit}", "CPU ms", "TFLOP/s", "of peak", "times as fast", "MiB"]
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
