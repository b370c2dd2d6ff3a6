"""Distillation: a frozen teacher that slides, a student that sees the image once (paper, section 3).

The module owns one registered network, the student. The teacher is the student with its trainable
tensors as they were at the start, so it needs no memory of its own until somebody asks for it: it
is in no state dict, DDP never sees it, and it stays right after a resume.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]  # exported, but not by the name mypy wants
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from spar_lightning import __version__
from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.packing import dense_features, features_of
from spar_lightning.backbones.parameter_groups import frozen_blocks, set_trainable
from spar_lightning.backbones.weights import difference
from spar_lightning.datamodules.dataloader import ResumeError as ResumeError
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datasets.samples import ActivationSample, LabelledImage, Sample
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark_config import BenchmarkConfig
from spar_lightning.evaluation.protocol import Protocol
from spar_lightning.feature_cache.extract import Teacher
from spar_lightning.segmentation.config import Inference, InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.text_embeddings import TextClassifiers
from spar_lightning.sliding_window import SlidingWindow


class CosineDecay(LambdaLR):
    """Half a cosine from the learning rate to zero at the end of the run.

    Closed form, unlike torch's CosineAnnealingLR: a resumed run may have another end.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        super().__init__(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1))))


class Distillation(LightningModule, Teacher):
    """Teach a backbone to give in one pass what it gives in sliding windows.

    Args:
        backbone: The pretrained network: teacher as it is, student as it becomes.
        trainable: Parts of the student that train: names or patterns of parameter groups, or `all`.
        loss: Compares student and teacher features of one image, both (h, w, d).
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        lr_schedule: A class whose first two arguments are the optimizer and the number of optimizer steps of the
            run, such as spar_lightning.distillation.CosineDecay; stepped after every step. null keeps lr constant.
        compile: Compile the teacher and, for validation, the student with torch.compile; takes minutes at the start,
            and any image size afterwards.
        inference: Settings of `InferenceConfig`: the teacher's windows, and how validation segments.
    """

    def __init__(
        self,
        backbone: Backbone,
        trainable: Sequence[str] = ("blocks.-2", "blocks.-1"),
        loss: nn.Module = lazy_instance(nn.MSELoss),
        lr: float = 2e-5,
        weight_decay: float = 1e-4,
        lr_schedule: Callable[[Optimizer, int], LRScheduler] | None = None,
        compile: bool = False,
        **inference: Any,
    ) -> None:
        super().__init__()
        if lr <= 0 or weight_decay < 0:
            raise UserError(f"lr must be positive and weight_decay not negative, but got {lr} and {weight_decay}.")
        self.student = backbone
        self.config = InferenceConfig(**inference)
        self.trainable = list(trainable)
        self.loss = loss
        self.lr = lr
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.compiled = compile
        if compile:
            backbone.compile(dynamic=True)
        set_trainable(backbone, backbone.parameter_groups(), self.trainable)
        # Buffers are constants: DDP need not broadcast rank 0's, and ranks may validate unevenly.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._start = {name: p.detach().clone() for name, p in backbone.named_parameters() if p.requires_grad}
        self._teacher: list[SlidingWindow] = []  # a list: not a submodule
        self._fitting = True
        self._classifiers = TextClassifiers(backbone, self.config.templates)
        SlidingWindow(backbone, self.config.stride)  # rejects a bad stride now, not after the data

    def prepare_data(self) -> None:
        """Read the upsampler's weights before the teacher's features are made: a missing file costs no hours."""
        self.config.build_upsampler()

    def setup(self, stage: str) -> None:
        self._fitting = stage == "fit"

    def build_teacher(self) -> SlidingWindow:
        backbone = copy.deepcopy(self.student)
        backbone.load_state_dict(self._start, strict=False)
        backbone.requires_grad_(False)
        if self.compiled:
            backbone.compile(dynamic=True)
        return SlidingWindow(backbone, self.config.stride, batch_size=self.config.window_batch).to(self.device)

    def teacher_backbone(self) -> Backbone:
        """Return a frozen copy of the backbone as it was before training; one pass of it is the student's start."""
        backbone = self.build_teacher().backbone
        assert isinstance(backbone, Backbone)
        return backbone

    def teacher_identity(self) -> dict[str, Any]:
        teacher = self.build_teacher()
        assert isinstance(teacher.backbone, Backbone)
        return {**teacher.backbone.identity(), **teacher.identity()}

    def build_activations(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        backbone, blocks = self.teacher_backbone().to(device), self.frozen_blocks
        return lambda pixels: backbone.trunk_tokens(backbone.normalize(pixels), blocks)

    @cached_property
    def frozen_blocks(self) -> int:
        return frozen_blocks(self.student, self.student.depth)

    def segmenter(
        self, task: BenchmarkConfig, inference: Inference | None = None, backbone: Backbone | None = None
    ) -> Segmenter:
        """Return a segmenter by the protocol of a benchmark; class names are encoded once.

        Args:
            task: The benchmark.
            inference: single or sliding; None as configured.
            backbone: None takes the student; `teacher_backbone` is the other choice.
        """
        config = self.config if inference is None else replace(self.config, inference=inference)
        return task.segmenter(backbone or self.student, config, self._classifiers)

    def protocol(self, precision: str) -> Protocol:
        """Return how the student would be measured now, in a precision by Lightning's name."""
        return Protocol(self.student, self.config, precision)

    def training_step(self, batch: list[Sample] | list[ActivationSample], batch_idx: int) -> Tensor:
        loss = self.batch_loss(batch)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch))
        return loss * self._weight(len(batch))

    def batch_loss(self, batch: list[Sample] | list[ActivationSample]) -> Tensor:
        """Mean over the images of a batch of each one's loss."""
        students, targets = self._features(batch)
        # In fp32 whatever the network ran in; every image counts the same, whatever its size.
        losses = [self.loss(s.float(), t.float()) for s, t in zip(students, targets, strict=True)]
        return torch.stack(losses).mean()

    def _features(self, batch: list[Sample] | list[ActivationSample]) -> tuple[list[Tensor], list[Tensor]]:
        """Features (h, w, d) of the student and of the teacher, image by image."""
        if cached := [sample for sample in batch if isinstance(sample, ActivationSample)]:
            targets = [sample.features for sample in cached]
            dtype = next(self.student.parameters()).dtype
            tokens = [sample.tokens[None].to(dtype) for sample in cached]
            grids = [(target.shape[0], target.shape[1]) for target in targets]
            return features_of(self.student, tokens, grids, self.frozen_blocks), targets
        samples = [sample for sample in batch if isinstance(sample, Sample)]
        images = [self.student.normalize(sample.image) for sample in samples]
        targets = [self._target(sample, image) for sample, image in zip(samples, images, strict=True)]
        return dense_features(self.student, images), targets

    def _weight(self, images: int) -> float | Tensor:
        """What makes the mean over processes one over images, where packs hold different numbers of them."""
        if self._trainer is None or self.trainer.world_size == 1:
            return 1.0
        mine = torch.tensor(float(images), device=self.device)
        mean: Tensor = self.trainer.strategy.reduce(mine.clone(), reduce_op="mean")
        return mine / mean

    @torch.no_grad()
    def _target(self, sample: Sample, image: Tensor) -> Tensor:
        """The teacher's features (h, w, d), from the cache or computed now."""
        if sample.features is not None:
            return sample.features
        if not self._teacher:
            self._teacher.append(self.build_teacher())
        features: Tensor = self._teacher[0](image[None])[0]
        return features

    def on_validation_start(self) -> None:
        self._segmenters = [self.segmenter(benchmark.description) for benchmark in self._data.benchmarks]

    def validation_step(
        self, batch: list[LabelledImage], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[Tensor]]:
        return {"labels": [self._segmenters[dataloader_idx](image.image) for image in batch]}

    @property
    def _data(self) -> SA1B:
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit and Trainer.validate
        assert isinstance(data, SA1B)
        return data

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if self.lr_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_schedule(optimizer, self._total_steps()), "interval": "step"},
        }

    def _total_steps(self) -> int:
        """Optimizer steps of the whole run, from what the Trainer was told and the length of an epoch."""
        trainer = self.trainer
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf
        # Not trainer.estimated_stepping_batches: reading it makes a loader forget where it was to resume.
        batches = len(self._data.train_dataloader())
        limit = trainer.limit_train_batches
        if limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(limit * batches)
        steps = epochs * math.ceil(batches / trainer.accumulate_grad_batches)
        if trainer.max_steps > 0:
            steps = min(steps, trainer.max_steps)
        if steps == math.inf:
            raise UserError("model.lr_schedule needs to know where a run ends. Set trainer.max_epochs or max_steps.")
        return int(steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # No save_hyperparameters: LightningCLI would read them back over the user's command line on resume.
        checkpoint["spar"] = {
            "version": __version__,
            "trainable": self.trainable,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        spar = checkpoint.get("spar")
        if spar is None:
            raise ResumeError("The checkpoint was not written by spar fit: it lacks the entry 'spar'.")
        if found := difference(checkpoint["state_dict"], self.state_dict()):
            raise ResumeError(
                f"The checkpoint does not fit {type(self.student).__name__}: {found}. "
                "Give the model.backbone that it was trained with."
            )
        if not self._fitting:
            return
        if spar["trainable"] != self.trainable:
            raise ResumeError(
                f"The checkpoint trained {spar['trainable']}, but model.trainable is {self.trainable}. An optimizer's "
                "state fits one selection only: give the old one, or start anew with another --run_dir."
            )
        if spar["lr"] != self.lr:
            _scale_learning_rate(checkpoint, self.lr / spar["lr"])
        for optimizer in checkpoint["optimizer_states"]:
            for group in optimizer["param_groups"]:
                group["weight_decay"] = self.weight_decay


def _scale_learning_rate(checkpoint: dict[str, Any], scale: float) -> None:
    """Let the configuration win over the saved optimizer and schedule, which hold the old run's rates."""
    for optimizer in checkpoint["optimizer_states"]:
        for group in optimizer["param_groups"]:
            group.update({key: group[key] * scale for key in ("lr", "initial_lr") if key in group})
    for schedule in checkpoint["lr_schedulers"]:
        keys = [key for key in ("base_lrs", "_last_lr") if key in schedule]
        schedule.update({key: [lr * scale for lr in schedule[key]] for key in keys})
