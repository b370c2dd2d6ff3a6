"""Distillation: a frozen teacher that slides, a student that sees the image once (paper, section 3).

The module owns one registered network, the student. The teacher is the student with its trainable
tensors as they were at the start, so it needs no memory of its own until somebody asks for it: it
is in no state dict, DDP never sees it, and it stays right after a resume.
"""

import copy
import math
from collections.abc import Callable, Sequence
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
from spar_lightning.backbones.weights import difference
from spar_lightning.datamodules.benchmark_description import BenchmarkDescription
from spar_lightning.datamodules.loader import ResumeError as ResumeError
from spar_lightning.datamodules.sample import LabelledImage, PrefixSample, Sample
from spar_lightning.errors import UserError, nearest
from spar_lightning.evaluation.protocol import Protocol
from spar_lightning.geometry import Geometry
from spar_lightning.packing import dense_features, features_of
from spar_lightning.refine import BILINEAR, LPOSS, REFINEMENTS, AnyUp, Refinement, check_weights
from spar_lightning.segmenter import Inference, Segmenter
from spar_lightning.sliding_window import SlidingWindow
from spar_lightning.text_embeddings import text_classifier
from spar_lightning.trainable import frozen_blocks, set_trainable
from spar_lightning.zero_shot import Templates, TextClassifier, prompt_templates


class CosineDecay(LambdaLR):
    """Half a cosine from the learning rate to zero at the end of the run.

    Closed form, unlike torch's CosineAnnealingLR: a resumed run may have another end.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        super().__init__(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1))))


class Distillation(LightningModule):
    """Teach a backbone to give in one pass what it gives in sliding windows.

    Args:
        backbone: The pretrained network: teacher as it is, student as it becomes.
        stride: Step between the teacher's windows in pixels; the paper takes 24 with patches of 16.
        trainable: Parts of the student that train: names or patterns of parameter groups, or `all`.
        loss: Compares student and teacher features of one image, both (h, w, d).
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        lr_schedule: A class whose first two arguments are the optimizer and the number of optimizer steps of the
            run, such as spar_lightning.distillation.CosineDecay; stepped after every step. null keeps lr constant.
        window_batch: Teacher windows per forward pass; null chooses by the device.
        compile: Compile the teacher and, for validation, the student with torch.compile; some minutes at the start, and
            images of any size afterwards.
        templates: Prompts of class names, averaged: openai_imagenet, the 80 of CLIP and of the paper, or a list with
            `{}` for the name.
        inference: How validation segments: `single` pass of the student, or `sliding` window.
        geometry: Validation images whose sides the patch does not divide: `aligned` resizes them to the nearest
            multiples, `paper` does what the published code does for the family of the backbone.
        refine: What follows the cosines of validation: `lposs` spreads them over similar patches as the paper does for
            pretrained networks and sliding windows (gamma 1), `lposs_spar` as for its student (gamma 10); or settings
            of one's own, such as {gamma: 5, k: 200}; those that are not given are those of `lposs`.
        upsampler: How they come from the patch grid to pixels: `bilinear`; guided by the image, `anyup` with the
            weights of its paper, `anyup_multi_backbone` with those for many backbones; or the path of a weight file
            of AnyUp.
    """

    def __init__(
        self,
        backbone: Backbone,
        stride: int = 24,
        trainable: Sequence[str] = ("blocks.-2", "blocks.-1"),
        loss: nn.Module = lazy_instance(nn.MSELoss),
        lr: float = 2e-5,
        weight_decay: float = 1e-4,
        lr_schedule: Callable[[Optimizer, int], LRScheduler] | None = None,
        window_batch: int | None = None,
        compile: bool = False,
        templates: Templates = "openai_imagenet",
        inference: Inference = "single",
        geometry: Geometry = "aligned",
        refine: Refinement | LPOSS = "none",
        upsampler: str = "bilinear",
    ) -> None:
        super().__init__()
        if lr <= 0 or weight_decay < 0:
            raise UserError(f"lr must be positive and weight_decay not negative, but got {lr} and {weight_decay}.")
        self.student = backbone
        self.stride = stride
        self.trainable = list(trainable)
        self.loss = loss
        self.lr = lr
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.window_batch = window_batch
        self.compiled = compile
        if compile:
            backbone.compile(dynamic=True)
        self.templates = templates
        self.inference: Inference = inference
        self.geometry: Geometry = geometry
        self.refine, self.upsampler = refine, upsampler
        set_trainable(backbone, backbone.parameter_groups(), self.trainable)
        # Buffers are constants: DDP need not send rank 0's round, and ranks may validate unevenly.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._start = {name: p.detach().clone() for name, p in backbone.named_parameters() if p.requires_grad}
        self._teacher: list[SlidingWindow] = []  # a list: no submodule
        self._upsamplers: dict[str, AnyUp] = {}  # nor these
        self._fitting = True
        self._classifiers: dict[tuple[tuple[str, tuple[str, ...]], ...], TextClassifier] = {}
        if not isinstance(refine, LPOSS) and refine not in REFINEMENTS:
            raise UserError(
                f"refine: there is no {refine!r}. {nearest(str(refine), REFINEMENTS)}Allowed are "
                f"{', '.join(REFINEMENTS)}, and an LPOSS of one's own."
            )
        if upsampler != BILINEAR:
            check_weights(upsampler)
        prompt_templates(templates)  # refuses what is none now, not after the data
        SlidingWindow(backbone, stride, batch_size=window_batch)  # refuses a bad stride now, not after the data

    def prepare_data(self) -> None:
        """Read the upsampler's weights before the teacher's features are made: one that is not there costs no hours."""
        self.build_upsampler()

    def setup(self, stage: str) -> None:
        self._fitting = stage == "fit"

    def build_teacher(self) -> SlidingWindow:
        """A frozen copy of the backbone as it was before training, in sliding windows, on this module's device."""
        backbone = copy.deepcopy(self.student)
        backbone.load_state_dict(self._start, strict=False)
        backbone.requires_grad_(False)
        if self.compiled:
            backbone.compile(dynamic=True)
        return SlidingWindow(backbone, self.stride, batch_size=self.window_batch).to(self.device)

    def teacher_backbone(self) -> Backbone:
        """A frozen copy of the backbone as it was before training: one pass of it is where the student started."""
        backbone = self.build_teacher().backbone
        assert isinstance(backbone, Backbone)
        return backbone

    def teacher_identity(self) -> dict[str, Any]:
        """What the teacher's features depend on: weights, windows and the arithmetic between them."""
        teacher = self.build_teacher()
        assert isinstance(teacher.backbone, Backbone)
        return {**teacher.backbone.identity(), **teacher.identity()}

    def build_prefix(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A copy of the student's frozen part on a device: tokens (1, prefix+N, D) of pixels (1, 3, H, W) uint8."""
        backbone, blocks = self.teacher_backbone().to(device), self.frozen_blocks

        return lambda pixels: backbone.trunk_tokens(backbone.normalize(pixels), blocks)

    @cached_property
    def frozen_blocks(self) -> int:
        """Blocks at the start that training does not change; `data.prefix` keeps what they give."""
        return frozen_blocks(self.student, self.student.depth)

    def segmenter(
        self, task: BenchmarkDescription, inference: Inference | None = None, backbone: Backbone | None = None
    ) -> Segmenter:
        """A segmenter by the protocol of a benchmark; class names are encoded once.

        Args:
            task: The benchmark.
            inference: single or sliding; None as configured.
            backbone: None takes the student; `teacher_backbone` is the other that there is.
        """
        backbone = self.student if backbone is None else backbone
        refine = self.refinement()
        classes = task.names()
        key = tuple(classes.items())
        if key not in self._classifiers:
            self._classifiers[key] = text_classifier(self.student, classes, self.templates)
        return Segmenter(
            backbone,
            self._classifiers[key],
            inference or self.inference,
            self.stride,
            self.window_batch,
            geometry=self.geometry,
            resize=task.resize,
            thresholds=task.thresholds_of(type(backbone)) if refine is None else None,  # other scores, other scale
            refine=refine,
            upsampler=self.build_upsampler(),
        )

    def protocol(self, precision: str) -> Protocol:
        """How the student would be measured now.

        Args:
            precision: Of the network's arithmetic, in Lightning's terms.
        """
        return Protocol(
            self.student, self.inference, self.stride, self.geometry, self.templates, precision,
            self.refinement(), self.build_upsampler(),
        )  # fmt: skip

    def refinement(self) -> LPOSS | None:
        """What follows the cosines, if anything."""
        return self.refine if isinstance(self.refine, LPOSS) else REFINEMENTS[self.refine]

    def build_upsampler(self) -> AnyUp | None:
        """The upsampler, read once for the same weights; None is bilinear."""
        if self.upsampler == BILINEAR:
            return None
        if self.upsampler not in self._upsamplers:
            self._upsamplers[self.upsampler] = AnyUp(self.upsampler)
        return self._upsamplers[self.upsampler]

    def training_step(self, batch: list[Sample] | list[PrefixSample], batch_idx: int) -> Tensor:
        loss = self.batch_loss(batch)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch))
        return loss * self._weight(len(batch))

    def batch_loss(self, batch: list[Sample] | list[PrefixSample]) -> Tensor:
        """Mean over the images of a batch of each one's loss."""
        students, targets = self._features(batch)
        # In fp32 whatever the network ran in; every image counts the same, whatever its size.
        losses = [self.loss(s.float(), t.float()) for s, t in zip(students, targets, strict=True)]
        return torch.stack(losses).mean()

    def _features(self, batch: list[Sample] | list[PrefixSample]) -> tuple[list[Tensor], list[Tensor]]:
        """Features (h, w, d) of the student and of the teacher, image by image."""
        if prefixed := [sample for sample in batch if isinstance(sample, PrefixSample)]:
            targets = [sample.features for sample in prefixed]
            dtype = next(self.student.parameters()).dtype
            tokens = [sample.tokens[None].to(dtype) for sample in prefixed]
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
        self._segmenters = [self.segmenter(b.description) for b in self._benchmarks()]

    def validation_step(
        self, batch: list[LabelledImage], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[Tensor]]:
        return {"labels": [self._segmenters[dataloader_idx](image.image) for image in batch]}

    def _benchmarks(self) -> Sequence[Any]:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit and Trainer.validate
        return datamodule.benchmarks  # type: ignore[no-any-return]

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
        batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
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
