"""Benchmark of the start-up time of `spar --help` and `spar fit`.

    python benchmarks/startup.py

They are compared with an empty Python process and with the imports of libraries, in interleaved repeats. Ratios are
ratios of medians. `spar fit` runs one step on synthetic images with cached features, without validation and pictures.
It cannot be faster than `import lightning.pytorch`.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

FIT = ["--data.train_scenes", "8", "--data.val_scenes", "1", "--data.val_sizes", "[]", "--trainer.max_steps", "1",
       "--trainer.enable_checkpointing", "false", "--trainer.logger", "false", "--overwrite"]  # fmt: skip


def seconds(command: list[str]) -> float:
    """Return the wall time of a command in seconds."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def compare(commands: dict[str, list[str]], rounds: int) -> None:
    """Time the commands and print the results. The last command is compared with the others."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            times[name].append(seconds(command))
    last = statistics.median(list(times.values())[-1])
    for name, values in times.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name:<26} {middle:8.3f} s ({low:.3f} to {high:.3f}), {rounds} runs, ratio {last / middle:.2f}")


def main() -> None:
    """Measure both commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    spar, python = shutil.which("spar"), sys.executable
    assert spar, "spar is not on the PATH: pip install -e ."
    compare({"python -c pass": [python, "-c", "pass"], "spar --help": [spar, "--help"]}, 5 * given.repeats)
    with tempfile.TemporaryDirectory(prefix="startup-") as place:
        quickstart = str(resources.files("spar_lightning.configs") / "quickstart.yaml")
        where = ["--run_dir", str(Path(place) / "run"), "--data.root", str(Path(place) / "scenes")]
        fit = [spar, "fit", "--config", quickstart, *where, *FIT]
        seconds(fit)  # warm-up: renders the images and computes the features
        imports = {f"import {name}": [python, "-c", f"import {name}"] for name in ("torch", "lightning.pytorch")}
        compare({**imports, "spar fit, one step": fit}, given.repeats)


if __name__ == "__main__":
    main()
