"""Options of `spar evaluate` in addition to those of a configuration: type, default and help."""

from pathlib import Path
from typing import Any, Final, Literal

from spar_lightning.evaluation.benchmark_config import SETS, SHIPPED

OUT: Final = Path("runs") / "evaluate"

OPTIONS: Final[dict[str, tuple[Any, Any, str]]] = {
    "weights": (str | None, None, "Run folder, checkpoint of spar fit, export, hf-hub:org/name, or weight file; "
                "for a sweep also several, separated by commas; null: the backbone as configured."),
    "benchmarks": (str | None, None, "Benchmarks, separated by commas: names, sets, YAML files or folders. Names: "
                   f"{', '.join(SHIPPED)}. Sets: {', '.join(f'{name} (the first {len(SETS[name])})' for name in SETS)}."
                   " null: data.benchmarks."),
    "root": (str | None, None, "Folder that contains the data of the bundled benchmarks; null: data.benchmark_root."),
    "precision": (Literal["32-true", "16-mixed", "bf16-mixed"], "32-true",
                  "Precision of the network during evaluation; trainer.precision is for training only."),
    "strides": (str | None, None, "Sweep over strides (Figure 1 of the paper), in pixels, separated by commas. "
                "Measures the configured network in a single pass and in sliding windows, and the networks of "
                "--weights in a single pass."),
    "sweep": (str | None, None, "Sweep over image areas (Figure 3 of the paper): sides of squares of the same area in "
              "pixels, separated by commas. Measures the same networks in a single pass; with --inference sliding, the "
              "configured network also in sliding windows."),
    "warm_ups": (int, 10, "Forward passes before the timed ones (sweep only)."),
    "repeats": (int, 10, "Timed forward passes, for median and quartiles (sweep only)."),
    "max_images": (int | None, None, "Number of images of each benchmark, spread evenly over it; null: all."),
    "gallery": (int, 4, "Best, worst and random images in report.html, this many of each; they are segmented twice."),
    "out": (str | None, None, f"Folder for the results; null: {OUT}/NAME-PROTOCOL."),
}  # fmt: skip
