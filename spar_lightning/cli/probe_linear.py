"""`spar probe linear`: a linear layer on frozen patch features, trained by Lightning on any number of processes."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from spar_lightning.callbacks.checkpoint import DurableCheckpointIO
from spar_lightning.callbacks.jsonl_logger import JSONLLogger
from spar_lightning.callbacks.progress_bar import FitProgress
from spar_lightning.cli.backbone_arguments import split_backbone_arguments
from spar_lightning.cli.lightning_messages import silence
from spar_lightning.cli.parser import Parser
from spar_lightning.cli.probe_options import OUT, add_inference, content, folder_name, opened, parsed, probe_parser
from spar_lightning.cli.ranks import connected, without_signal_handlers
from spar_lightning.distributed import is_first_process, world_size
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.environment import environment
from spar_lightning.files.hashing import hash_json
from spar_lightning.probes.encoder import PatchEncoder
from spar_lightning.probes.linear import Linear, LinearProbe
from spar_lightning.probes.report import FILES, ProbeReport
from spar_lightning.stopping import Stopped
from spar_lightning.student import load_student

DESCRIPTION = """Train a linear layer on the frozen patch features of a backbone, and segment the images of a benchmark
with it (Tables 4 and 7 of the paper). Training images are changed in color and mirrored; with --crop_size, also scaled
and cropped.

A command that was stopped continues at the last evaluation when it is run again. Settings of inference default to those
of the run."""
EXAMPLES = (
    "spar probe linear --weights runs/siglip2_vitb16 --benchmark voc21 --root /data/benchmarks --crop_size 512",
    "spar probe linear --weights runs/siglip2_vitb16 --benchmark ade20k --root /data/benchmarks --steps 40000",
)


def parser() -> Parser:
    """Return the parser of the command."""
    parser = probe_parser("linear", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    parser.add_class_arguments(Linear)
    add("--seed", type=int, default=0, help="Seed of the layer, the order of images and their augmentation; results of "
        "several seeds are collected in one folder")  # fmt: skip
    add("--accelerator", type=str, default="auto", help="Device type: auto, cpu, gpu, ...")
    add("--devices", type=int, default=1, help="Number of devices per machine, each with a process")
    add("--num_nodes", type=int, default=1, help="Number of machines")
    add("--rank_timeout", type=float, default=120.0, help="Seconds without a sign of life from a process after which "
        "all end")  # fmt: skip
    add_inference(parser)
    return parser


def run(args: Sequence[str]) -> int:
    """Train the layer, evaluate it, and print a table."""
    silence()
    own, arguments = split_backbone_arguments(args)
    given, inference = parsed(parser(), own)
    settings = Linear(**{field.name: given[field.name] for field in fields(Linear)})
    check_at_least(1, **{f"--{name}": given[name] for name in ("max_images", "devices", "num_nodes")})
    check_at_least(0, **{"--num_workers": given.num_workers, "--seed": given.seed})
    benchmark, training = opened(given)
    trainer = _trainer(given, settings)
    if world_size() not in (1, trainer.world_size):
        raise UserError(
            f"The launcher started {world_size()} processes, but {trainer.world_size} are configured. Set --devices "
            "(per machine) and --num_nodes."
        )
    if settings.batch_size % trainer.world_size:
        raise UserError(
            f"--batch_size {settings.batch_size} must be a multiple of the number of processes, {trainer.world_size}."
        )
    if len(benchmark) < trainer.world_size:
        raise UserError(f"{benchmark.name} has {len(benchmark)} images for {trainer.world_size} processes. Use fewer.")
    student = load_student(given.weights, given.config, inference, arguments)
    encoder = PatchEncoder(student.backbone, student.config, given.features)
    chosen = {**asdict(settings), "features": given.features, "precision": str(trainer.precision)}
    del chosen["check_every"]
    try:
        with connected(["probe", "linear", *args], trainer, given.rank_timeout):
            # Only rank 0 reads all files, to hash them, and decides: other ranks may have another disk.
            mine = (
                content("linear", chosen, benchmark, training, encoder, student.config)
                if trainer.is_global_zero
                else {}
            )
            found: dict[str, Any] = trainer.strategy.broadcast(mine)
            folder = Path(given.out or OUT / folder_name(found))
            facts = environment(Fabric(accelerator=given.accelerator, devices=1)) | {"processes": trainer.world_size}
            report = ProbeReport(folder, found, facts) if trainer.is_global_zero else None
            if not trainer.strategy.broadcast(report is not None and str(given.seed) in report.rows):
                identity = hash_json([found, given.seed])
                probe = LinearProbe(encoder, benchmark, training, settings, given.seed, identity, given.num_workers)
                _train(trainer, probe, folder, given.seed)
                if report is not None:
                    report.add(given.seed, *_result(probe, benchmark, training, settings))
            if report is not None:
                print(f"\n{report.table()}\n\n{folder}: {', '.join(FILES)}")
    except Stopped:
        if is_first_process():
            print("Stopped. To continue, run the same command again.", flush=True)
        raise
    return 0


def _result(
    probe: LinearProbe, benchmark: Benchmark, training: Benchmark, settings: Linear
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the numbers of the last evaluation, and the IoU of each class."""
    assert probe.counts is not None
    result = benchmark.results(probe.counts)
    numbers = {
        "mIoU": result.miou,
        "pixel accuracy": result.accuracy,
        "images": result.images,
        "training images": len(training),
        "steps": settings.steps,
    }
    return numbers, dict(zip(benchmark.classes, result.per_class, strict=True))


def _trainer(given: Any, settings: Linear) -> Trainer:
    """Return a Trainer in which an epoch ends with each evaluation."""
    trainer = Trainer(
        accelerator=given.accelerator,
        devices=given.devices,
        num_nodes=given.num_nodes,
        precision=given.precision,
        strategy="ddp" if given.devices * given.num_nodes > 1 else "auto",
        max_steps=settings.steps,
        max_epochs=-1,
        accumulate_grad_batches=max(1, settings.batch_size // (given.devices * given.num_nodes)),
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        logger=False,
        callbacks=[FitProgress("linear probe")],
        enable_checkpointing=False,
        plugins=[DurableCheckpointIO()],
    )
    return without_signal_handlers(trainer)


def _train(trainer: Trainer, probe: LinearProbe, folder: Path, seed: int) -> None:
    """Train from the last checkpoint of this seed, if there is one; the probe has its counts afterward."""
    name = f"seed-{seed}"
    checkpoint = ModelCheckpoint(
        folder / "checkpoints", name, save_on_train_epoch_end=True, enable_version_counter=False
    )
    trainer.callbacks.append(checkpoint)  # type: ignore[attr-defined]
    logs = folder / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    trainer.logger = JSONLLogger(str(logs))
    path = folder / "checkpoints" / f"{name}.ckpt"
    found = trainer.strategy.broadcast(path.exists())
    if found and not path.exists():
        raise UserError(f"{path} is on the disk of rank 0 only. All machines need access to the same --out.")
    trainer.fit(probe, ckpt_path=path if found else None)
    if probe.counts is None:  # training had ended before
        trainer.validate(probe, verbose=False)
    assert trainer.global_step == trainer.max_steps
