"""How long `spar --help` takes, against an empty Python start: a ratio of medians, alternating.

python benchmarks/startup.py
"""

import shutil
import statistics
import subprocess
import sys
import time

PAIRS = 25


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    spar = shutil.which("spar")
    assert spar, "spar is not on the PATH: pip install -e ."
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "spar --help": [spar, "--help"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(PAIRS):
        for name, command in commands.items():
            times[name].append(seconds(command))
    for name, values in times.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name:<16} median {1000 * middle:.1f} ms (from {1000 * low:.1f} to {1000 * high:.1f}), {PAIRS} runs")
    empty, spar_help = (statistics.median(values) for values in times.values())
    print(f"ratio            {spar_help / empty:.2f}")


if __name__ == "__main__":
    main()
