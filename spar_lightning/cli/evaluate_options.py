"""Options of `spar evaluate` in addition to those of a configuration: type, default and help."""

from pathlib import Path
from typing import Any, Final, Literal

from spar_lightning.evaluation.benchmark_config import SHIPPED

OUT: Final = Path("runs") / "evaluate"

OPTIONS: Final[dict[str, tuple[Any, Any, str]]] = {
    "weights": (str | None, None, "Run folder, checkpoint of fit, or weight file; for a sweep several, with "
                "commas between; null: as configured."),
    "benchmarks": (str | None, None, f"all, or names, YAML files and folders with commas between; all are "
                   f"{', '.join(SHIPPED)}; null: data.benchmarks."),
    "root": (str | None, None, "Folder in which the benchmarks lie; null: data.benchmark_root."),
    "precision": (Literal["32-true", "16-mixed", "bf16-mixed"], "32-true",
                  "Of the network's arithmetic; trainer.precision is that of training."),
    "strides": (str | None, None, "Sweep, Figure 1 of the paper: the network as configured, in a single pass "
                "and in sliding windows at these strides, with commas between; those of --weights in a single "
                "pass."),
    "sweep": (str | None, None, "Sweep, Figure 3 of the paper: the same networks in a single pass on images of "
              "these areas, each the side of a square in pixels; with --inference sliding the one as "
              "configured in sliding windows, too."),
    "warm_ups": (int, 10, "Of a sweep: forward passes that are not timed."),
    "repeats": (int, 10, "Of a sweep: forward passes that are timed, for median and quartiles."),
    "max_images": (int | None, None, "Images of each benchmark, spread evenly over it; null: all."),
    "out": (str | None, None, f"Folder of the results; null: {OUT}/NAME-PROTOCOL."),
}  # fmt: skip
