"""Distillation of a frozen sliding-window teacher into a single-pass student (paper, section 3).

The module contains one registered network, the student. The teacher is a copy of the student with the trainable tensors
as they were at the start. The copy is created when it is first needed, so it takes no memory before. It is not in the
state dict and not visible to DDP, and it is still correct after a resume.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed
from jsonargparse import lazy_instance  # type: ignore[attr-defined]  # exported, but not by the name mypy wants
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from spar_lightning import __version__
from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.low_rank import add_low_rank, merge
from spar_lightning.backbones.packing import dense_features, features_of
from spar_lightning.backbones.parameter_groups import frozen_blocks, set_trainable
from spar_lightning.backbones.weights import difference
from spar_lightning.cosine_decay import CosineDecay as CosineDecay
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datamodules.samplers import ResumeError as ResumeError
from spar_lightning.datasets.samples import ActivationSample, LabelledImage, Sample
from spar_lightning.distributed import is_first_process
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark_config import BenchmarkConfig
from spar_lightning.evaluation.protocol import Protocol
from spar_lightning.feature_cache.extract import Teacher
from spar_lightning.losses import ClassSimilarityLoss, warn_if_tiny
from spar_lightning.random_scale import RandomScale
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.text_embeddings import TextClassifiers
from spar_lightning.sliding_window import SinglePass, SlidingWindow


class DivergenceError(UserError):
    """Error of a training run whose loss or weights are NaN or infinite."""


class Distillation(LightningModule, Teacher):
    """Lightning module that distills the sliding-window features of a backbone into a single pass.

    Args:
        backbone: Pretrained backbone: frozen as the teacher, trained as the student.
        trainable: Parameter groups of the student to train: a list of names or patterns such as blocks.-1 (the last
            block), or `all`.
        lora_rank: Rank of LoRA: only low-rank updates of the linear layers among `trainable` are trained, and merged
            when the student is loaded. null trains all parameters of `trainable`.
        loss: Loss between student and teacher features (h, w, d) of an image: MSELoss (the paper), CosineLoss,
            MSECosineLoss, GramLoss, ClassSimilarityLoss or a class path.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        lr_schedule: Scheduler class that takes the optimizer and the number of optimizer steps of the run, such as
            spar_lightning.cosine_decay.CosineDecay; stepped after every optimizer step. null keeps lr constant.
        teacher: `sliding` (the paper) or `single`, a single pass over the whole image with full attention.
        student_scale: Smallest and largest factor by which the image of the student is resized, drawn in each step. Its
            features are resized to the patch grid of the teacher (multi-resolution distillation, paper, Table 9).
            data.pack_tokens counts the patches before. [1, 1] keeps the size.
        compile: Compile the teacher and, for validation, the student with torch.compile. Compilation takes minutes at
            the start and supports any image size.
        inference: Settings of `InferenceConfig`: the teacher's windows, and inference during validation.

    Raises:
        UserError: If a setting is outside its range.
    """

    def __init__(
        self,
        backbone: Backbone,
        trainable: Sequence[str] = ("blocks.-2", "blocks.-1"),
        lora_rank: int | None = None,
        loss: nn.Module = lazy_instance(nn.MSELoss),
        lr: float = 2e-5,
        weight_decay: float = 1e-4,
        lr_schedule: Callable[[Optimizer, int], LRScheduler] | None = None,
        teacher: Literal["sliding", "single"] = "sliding",
        student_scale: tuple[float, float] = (1.0, 1.0),
        compile: bool = False,
        **inference: Any,
    ) -> None:
        super().__init__()
        if lr <= 0 or weight_decay < 0:
            raise UserError(f"lr must be positive and weight_decay not negative, but got {lr} and {weight_decay}.")
        if teacher not in ("sliding", "single"):
            raise UserError(f"teacher must be sliding or single, but got {teacher!r}.")
        self.config = InferenceConfig(**inference)
        self.config.check_blocks()
        backbone = backbone.with_attention(self.config.windowed)
        self.student = backbone
        self.trainable, self.lora_rank = list(trainable), lora_rank
        self.loss = loss
        self.lr, self.weight_decay, self.lr_schedule = lr, weight_decay, lr_schedule
        self.teacher, self.scale = teacher, RandomScale(*student_scale)
        self.compiled = compile
        if compile:
            backbone.compile(dynamic=True)
        chosen = set_trainable(backbone, backbone.parameter_groups(), self.trainable)
        if lora_rank is not None:
            add_low_rank(backbone, chosen, lora_rank)
        # Buffers are constant: without their broadcast by DDP, ranks can validate different numbers of images.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._start = {name: p.detach().clone() for name, p in backbone.named_parameters() if p.requires_grad}
        self._teacher: list[SlidingWindow] = []  # in a list, so that it is not registered as a submodule
        self._fitting = True
        self._classifiers = TextClassifiers(backbone, self.config.templates)
        SlidingWindow(backbone, self.config.stride)  # raises for an invalid stride before data preparation

    def prepare_data(self) -> None:
        """Load what training and validation need, so that a missing file raises before hours of feature extraction."""
        self.config.build_upsampler()
        self._encode_classes()

    def setup(self, stage: str) -> None:
        """Record whether the run trains."""
        self._fitting = stage == "fit"

    def on_fit_start(self) -> None:
        """Encode the class names of the loss on all ranks, outside of autocast."""
        self._encode_classes()

    def _encode_classes(self) -> None:
        """Encode the class names of the loss, if it has any, once per process."""
        for part in self.loss.modules():
            if isinstance(part, ClassSimilarityLoss):
                part.encode(self._classifiers)

    def build_teacher(self) -> SlidingWindow:
        backbone = copy.deepcopy(self.student.with_attention(None))  # windows have the native size
        backbone.load_state_dict(self._start, strict=False)
        merge(backbone)
        backbone.requires_grad_(False)
        if self.compiled:
            backbone.compile(dynamic=True)
        return self.sliding_window(backbone).to(self.device)

    def sliding_window(self, backbone: Backbone) -> SlidingWindow:
        """Return the teacher with this backbone."""
        if self.teacher == "single":
            return SinglePass(backbone)
        return SlidingWindow(backbone, self.config.stride, batch_size=self.config.window_batch, blend=self.config.blend)

    def teacher_backbone(self) -> Backbone:
        """Return a frozen copy of the backbone as it was before training."""
        backbone = self.build_teacher().backbone
        assert isinstance(backbone, Backbone)
        return backbone

    def teacher_identity(self) -> dict[str, Any]:
        teacher = self.build_teacher()
        assert isinstance(teacher.backbone, Backbone)
        return {**teacher.backbone.identity(), **teacher.identity()}

    def build_activations(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        backbone, blocks = self.teacher_backbone().with_attention(self.config.windowed).to(device), self.frozen_blocks
        return lambda pixels: backbone.trunk_tokens(backbone.normalize(pixels), blocks)

    @cached_property
    def frozen_blocks(self) -> int:
        """Number of blocks before the first trainable one.

        Raises:
            UserError: If the image of the student is resized in each step.
        """
        if not self.scale.keeps_size:
            raise UserError(
                "data.cache_activations stores activations of images of one size, but model.student_scale resizes them "
                "in each step. Set data.cache_activations: false, or model.student_scale: [1, 1]."
            )
        return frozen_blocks(self.student, self.student.depth)

    def segmenter(
        self, task: BenchmarkConfig, config: InferenceConfig | None = None, backbone: Backbone | None = None
    ) -> Segmenter:
        """Return a segmenter for a benchmark, according to its protocol; class names are encoded only once.

        Args:
            task: Configuration of the benchmark.
            config: Inference settings; None uses those of the module.
            backbone: Backbone to use, such as `teacher_backbone()`; None uses the student.
        """
        return task.segmenter(backbone or self.student, config or self.config, self._classifiers)

    def protocol(self, precision: str) -> Protocol:
        """Return the evaluation protocol of the student.

        Args:
            precision: Precision as named by Lightning, such as 16-mixed.
        """
        return Protocol(self.student, self.config, precision)

    def training_step(self, batch: list[Sample] | list[ActivationSample], batch_idx: int) -> Tensor:
        """Compute the loss of a batch; every image of all ranks has the same weight.

        Raises:
            DivergenceError: If the loss is not finite on any rank. All ranks raise in the same step.
        """
        loss = self.batch_loss(batch)
        finite = bool(loss.isfinite())
        # NaN as a number of images makes the weights of all ranks NaN: one that continued would wait in backward.
        weighted = loss * self._weight(len(batch) if finite else math.nan)
        if not weighted.isfinite():
            raise self._diverged(self._of_any_rank(None if finite else _described(loss, batch)))
        self.log("loss", loss, prog_bar=True, batch_size=len(batch))
        return weighted

    def _of_any_rank(self, found: str | None) -> str:
        """Return the first text that is not None; ranks without a finding thus report that of another rank."""
        texts = [found]
        if self._trainer is not None and self.trainer.world_size > 1:
            texts *= self.trainer.world_size
            torch.distributed.all_gather_object(texts, found)
        return next(text for text in texts if text is not None)

    def _diverged(self, found: str) -> DivergenceError:
        """Return the error with what was found, the step and what to do."""
        return DivergenceError(
            f"{found} at global step {self.global_step}. Training was stopped, and no checkpoint was overwritten. "
            f"Lower model.lr (now {self.lr:g}), or check the pretrained weights, trainer.precision and the images. "
            "Then continue from the last good checkpoint with --resume auto."
        )

    def batch_loss(self, batch: list[Sample] | list[ActivationSample]) -> Tensor:
        """Compute the mean loss over the images of a batch."""
        self._encode_classes()
        students, targets = self._features(batch)
        if self._trainer is not None and self.global_step == 0 and is_first_process():
            warn_if_tiny(targets)
        # The loss is computed in float32 at any precision of the run; images of all sizes have the same weight.
        with torch.autocast(self.device.type, enabled=False):
            losses = [self.loss(s.float(), t.float()) for s, t in zip(students, targets, strict=True)]
        return torch.stack(losses).mean()

    def _features(self, batch: list[Sample] | list[ActivationSample]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features (h, w, d) of the student and of the teacher for each image."""
        if cached := [sample for sample in batch if isinstance(sample, ActivationSample)]:
            targets = [sample.features for sample in cached]
            dtype = next(self.student.parameters()).dtype
            tokens = [sample.tokens[None].to(dtype) for sample in cached]
            grids = [(target.shape[0], target.shape[1]) for target in targets]
            return features_of(self.student, tokens, grids, self.frozen_blocks), targets
        samples = [sample for sample in batch if isinstance(sample, Sample)]
        images = [self.student.normalize(sample.image) for sample in samples]
        targets = [self._target(sample, image) for sample, image in zip(samples, images, strict=True)]
        patch, step, both = self.student.patch_size, self.global_step, zip(samples, images, strict=True)
        students = dense_features(self.student, [self.scale.image(image, patch, step, s.key) for s, image in both])
        return [self.scale.features(s, t) for s, t in zip(students, targets, strict=True)], targets

    def _weight(self, images: float) -> float | Tensor:
        """Return the loss weight that turns DDP's mean over ranks into a mean over images, for packs of any size."""
        if self._trainer is None or self.trainer.world_size == 1:
            return 1.0
        mine = torch.tensor(float(images), device=self.device)
        mean: Tensor = self.trainer.strategy.reduce(mine.clone(), reduce_op="mean")
        return mine / mean

    @torch.no_grad()
    def _target(self, sample: Sample, image: Tensor) -> Tensor:
        """Return the teacher's features (h, w, d), cached or computed."""
        if sample.features is not None:
            return sample.features
        if not self._teacher:
            self._teacher.append(self.build_teacher())
        features: Tensor = self._teacher[0](image[None])[0]
        return features

    def on_validation_start(self) -> None:
        """Build a segmenter for each benchmark."""
        self._segmenters = [self.segmenter(benchmark.description) for benchmark in self._data.benchmarks]

    def validation_step(
        self, batch: list[LabelledImage], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[Tensor]]:
        """Segment the images of a batch."""
        return {"labels": [self._segmenters[dataloader_idx](image.image) for image in batch]}

    @property
    def _data(self) -> SA1B:
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit and Trainer.validate
        assert isinstance(data, SA1B)
        return data

    def configure_optimizers(self) -> Any:
        """Return AdamW and, if configured, the learning-rate schedule."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if self.lr_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_schedule(optimizer, self._total_steps()), "interval": "step"},
        }

    def _total_steps(self) -> int:
        """Compute the optimizer steps of the whole run from the Trainer's options and the epoch length."""
        trainer = self.trainer
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf
        # trainer.estimated_stepping_batches is not used: reading it resets the position at which a loader resumes.
        batches = len(self._data.train_dataloader())
        limit = trainer.limit_train_batches
        if limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(limit * batches)
        steps = epochs * math.ceil(batches / trainer.accumulate_grad_batches)
        if trainer.max_steps > 0:
            steps = min(steps, trainer.max_steps)
        if steps == math.inf:
            raise UserError("model.lr_schedule needs a finite run. Set trainer.max_epochs or trainer.max_steps.")
        return int(steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the version and the settings that on_load_checkpoint compares.

        Raises:
            DivergenceError: If a trained parameter is not finite. The previous checkpoint is then not replaced.
        """
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        if not torch.stack([p.isfinite().all() for p in trained.values()]).all():  # one synchronization for all
            bad = [name for name, p in trained.items() if not p.isfinite().all()]
            raise self._diverged(f"{len(bad)} of {len(trained)} trained parameters (first: {bad[0]}) are not finite")
        # save_hyperparameters is not used: on resume, LightningCLI would override the command line with its values.
        checkpoint["spar"] = {
            "version": __version__,
            "trainable": self.trainable,
            "lora_rank": self.lora_rank,
            "attention": self.student.attention_identity(),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint; in fit, apply the configured learning rate and weight decay to it.

        Raises:
            ResumeError: If the checkpoint does not match the backbone, `trainable`, `lora_rank` or `attention`.
        """
        spar = checkpoint.get("spar")
        if spar is None:
            raise ResumeError("The checkpoint was not written by spar fit: the entry 'spar' is missing.")
        if (rank := spar.get("lora_rank")) != self.lora_rank:
            raise ResumeError(
                f"The checkpoint was trained with model.lora_rank {rank or 'null'}, but it is "
                f"{self.lora_rank or 'null'}. Restore the value, or start a new run with another --run_dir."
            )
        if found := difference(checkpoint["state_dict"], self.state_dict()):
            raise ResumeError(
                f"The checkpoint does not match {type(self.student).__name__}: {found}. "
                "Set model.backbone to the backbone that it was trained with."
            )
        if not self._fitting:
            return
        if spar["trainable"] != self.trainable:
            raise ResumeError(
                f"The checkpoint was trained with {spar['trainable']}, but model.trainable is {self.trainable}. Its "
                "optimizer state does not match. Restore the value, or start a new run with another --run_dir."
            )
        if (attention := spar.get("attention")) != self.student.attention_identity():
            trained = "full" if attention is None else f"windowed {attention}"
            raise ResumeError(
                f"The checkpoint was trained with another model.attention: {trained}. Restore the value, or start a "
                "new run with another --run_dir."
            )
        if spar["lr"] != self.lr:
            _scale_learning_rate(checkpoint, self.lr / spar["lr"])
        for optimizer in checkpoint["optimizer_states"]:
            for group in optimizer["param_groups"]:
                group["weight_decay"] = self.weight_decay


def _described(loss: Tensor, batch: list[Sample] | list[ActivationSample]) -> str:
    keys = ", ".join(sample.key for sample in batch[:3])
    return f"The loss is {loss.item()} (images: {keys}{', ...' if len(batch) > 3 else ''})"


def _scale_learning_rate(checkpoint: dict[str, Any], scale: float) -> None:
    """Rescale the saved optimizer and schedule, so that the configured learning rate applies."""
    for optimizer in checkpoint["optimizer_states"]:
        for group in optimizer["param_groups"]:
            group.update({key: group[key] * scale for key in ("lr", "initial_lr") if key in group})
    for schedule in checkpoint["lr_schedulers"]:
        keys = [key for key in ("base_lrs", "_last_lr") if key in schedule]
        schedule.update({key: [lr * scale for lr in schedule[key]] for key in keys})
