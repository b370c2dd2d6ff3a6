"""Shared parts of the probes of `spar probe`: options, benchmarks, and what a result depends on."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from spar_lightning.cli.parser import Parser
from spar_lightning.distributed import world_size
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.protocol import Protocol
from spar_lightning.files.hashing import hash_json
from spar_lightning.probes.encoder import Features, PatchEncoder
from spar_lightning.segmentation.config import InferenceConfig

OUT: Final = Path("runs") / "probe"
INFERENCE: Final = ("inference", "stride", "blend", "window_batch", "attention")  # others concern similarities


def probe_parser(name: str, description: str, examples: tuple[str, ...], trained: bool = True) -> Parser:
    """Return a parser with the options of all probes except those of inference.

    Args:
        name: Name of the probe.
        description: Text of the help.
        examples: Commands of the help.
        trained: Whether the probe has training images and a choice of features.
    """
    parser = Parser(f"spar probe {name}", description=description, default_env=False)
    parser.usage_line = "--weights WEIGHTS --benchmark BENCHMARK [options]"
    parser.examples = examples
    add = parser.add_argument
    add("--weights", required=True, type=str, help="Run folder, checkpoint, export, hf-hub:org/name, weight file "
        "together with --config, or name of a backbone such as siglip2")  # fmt: skip
    add("--benchmark", required=True, type=str, help="Name of a benchmark, YAML file, or folder with benchmark.yaml, "
        "images/ and labels/")  # fmt: skip
    add("--root", type=str, help="Folder that contains the data of the bundled benchmarks")
    if trained:
        add("--train", type=str, help="Benchmark (YAML file or folder) whose images are the training images; by "
            "default those that `train` in the YAML file of --benchmark names")  # fmt: skip
        add("--features", type=Features, default="trunk", help="`trunk`: tokens after the last block and its norm; "
            "`dense`: features in the text embedding space")  # fmt: skip
    add("--max_images", type=int | None, help="Number of images to segment, spread evenly over the benchmark; all by "
        "default")  # fmt: skip
    add("--precision", type=Literal["32-true", "16-mixed", "bf16-mixed"], default="32-true",
        help="Precision of the network and of training")  # fmt: skip
    add("--num_workers", type=int, default=2, help="Number of processes that read images")
    add("--config", type=str, help="YAML file of the run, if the weights do not name their network")
    add("--out", type=str | None, help=f"Folder for the results; by default {OUT}/{name}-BENCHMARK-HASH")
    return parser


def add_inference(parser: Parser, *more: str) -> None:
    """Add the options of inference that affect the features of patches, and those named in `more`."""
    parser.add_class_arguments(InferenceConfig, skip={*InferenceConfig.__dataclass_fields__} - {*INFERENCE, *more})


def parsed(parser: Parser, args: list[str]) -> tuple[Any, dict[str, Any]]:
    """Return the parsed options, and the settings of inference that were given."""
    given = parser.instantiate(parser.parse_args(args))
    changed = parser.parse_args(args, defaults=False)
    return given, {name: given[name] for name in InferenceConfig.__dataclass_fields__ if name in changed}


def opened(given: Any) -> tuple[Benchmark, Benchmark]:
    """Return the benchmark and its training images, opened.

    Raises:
        UserError: If one cannot be opened, or if their classes differ.
    """
    benchmark = opened_benchmark(given)
    if given.train is None:
        training = benchmark.training()
    else:
        training = Benchmark(given.train, given.root)
        training.open()
    ours, theirs = list(benchmark.classes), list(training.classes)
    if ours != theirs:
        raise UserError(
            f"--train {given.train}: its classes ({', '.join(theirs[:5])}, ..) differ from those of {benchmark.name} "
            f"({', '.join(ours[:5])}, ..). They must be the same, in the same order."
        )
    if both := {path.resolve() for path in training.paths} & {path.resolve() for path in benchmark.paths}:
        raise UserError(
            f"{len(both)} images are both in {training.name} and in {benchmark.name}, such as {min(both)}. Pass other "
            "training images."
        )
    return benchmark, training


def opened_benchmark(given: Any) -> Benchmark:
    """Return the benchmark with the images to segment, opened."""
    benchmark = Benchmark(given.benchmark, given.root)
    benchmark.open()
    benchmark.keep(given.max_images)
    return benchmark


def content(
    probe: str,
    settings: dict[str, Any],
    benchmark: Benchmark,
    training: Benchmark | None,
    encoder: PatchEncoder,
    config: InferenceConfig,
) -> dict[str, Any]:
    """Return what the results of a probe depend on, as plain data.

    Args:
        probe: Name of the probe.
        settings: Settings of the probe; `precision` is one of them.
        benchmark: Opened benchmark.
        training: Training images, if the probe has any.
        encoder: Encoder of the patches.
        config: Settings of inference.
    """
    protocol = Protocol(encoder.backbone, config, settings["precision"])
    common = ("inference", "stride", "attention", *(() if training else ("templates", "templates_sha256")))
    shared = {name: value for name, value in protocol.content().items() if name in common}
    learned = {} if training is None else {
        "training_images": len(training), "training_images_sha256": training.digest(),
        "training_labels": [kind.protocol() for kind in training.description.labels],
    }  # fmt: skip
    return {
        "model": encoder.backbone.identity() | {"window": encoder.backbone.window},
        "protocol": {"algorithm": 1, "probe": probe, **shared, **settings},
        "benchmark": {
            "name": benchmark.name,
            "images": len(benchmark),
            "images_sha256": benchmark.digest(),
            **learned,
            "classes": list(benchmark.classes),
            "labels": [kind.protocol() for kind in benchmark.description.labels],
            "instances": asdict(benchmark.description.instances) if benchmark.description.instances else None,
        },
    }


def folder_name(found: dict[str, Any]) -> str:
    """Return the name of the result folder for the content of a result."""
    return f"{found['protocol']['probe']}-{found['benchmark']['name'][:100]}-{hash_json(found, 12)}"


def check_single_process(probe: str) -> None:
    """Raise UserError if a launcher has started several processes, which would all do the same."""
    if world_size() > 1:
        raise UserError(f"spar probe {probe} uses one process, but {world_size()} were started. Start one.")
