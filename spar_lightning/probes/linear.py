"""Linear probe: one linear layer on the frozen patch features, trained on labeled images (Tables 4 and 7)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from spar_lightning.datasets.loader import one_by_one
from spar_lightning.datasets.samples import IGNORED, LabelledImage
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.probes.augmentation import square_starts
from spar_lightning.probes.encoder import PatchEncoder
from spar_lightning.probes.training_images import TrainingImages
from spar_lightning.refinement.base import BAND
from spar_lightning.segmentation.label_map import StoredMaps, Thresholds, label_map
from spar_lightning.sliding_window import interpolation_matrix


@dataclass(frozen=True)
class Linear:
    """Settings of the linear probe.

    Attributes:
        steps: Number of optimizer steps. The paper's supplement has 20,000 for PASCAL VOC and Cityscapes and 40,000 for
            ADE20K.
        batch_size: Number of images per optimizer step, over all processes. Images are processed one at a time.
        lr: Learning rate of AdamW; it decays to 0 with power 0.9.
        weight_decay: Weight decay of AdamW.
        crop_size: Side of square crops in pixels, for training at random scales and for evaluation (Table 7: 512, or
            1024 for Cityscapes); null keeps the size of each image (Table 4).
        check_every: Number of optimizer steps between two evaluations, each with a checkpoint.

    Raises:
        UserError: If a value is out of range.
    """

    steps: int = 20_000
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.05
    crop_size: int | None = None
    check_every: int = 1000

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "crop_size", "check_every")
        check_at_least(1, **{f"--{name}": getattr(self, name) for name in names})
        if not self.lr > 0 or self.weight_decay < 0:
            raise UserError(
                f"--lr must be above 0 and --weight_decay at least 0, but got {self.lr} and {self.weight_decay}."
            )


class LinearProbe(LightningModule):
    """Lightning module with the linear layer, its training images and its evaluation.

    Args:
        encoder: Encoder of the patches. It is frozen, and part of neither state dict nor DDP.
        benchmark: Opened benchmark for evaluation.
        training: Training images with the same classes.
        settings: Settings of the probe.
        seed: Seed of the layer, the order and the augmentation.
        identity: Text that only checkpoints of the same probe have.
        num_workers: Number of loader processes.

    Attributes:
        counts: Confusion matrix of the last evaluation, over all ranks; None before it.
    """

    def __init__(
        self,
        encoder: PatchEncoder,
        benchmark: Benchmark,
        training: Benchmark,
        settings: Linear,
        seed: int = 0,
        identity: str = "",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self._encoder, self._benchmark, self._settings = encoder, benchmark, settings
        self._images = TrainingImages(training, len(training), settings.crop_size, seed)
        self._identity, self._workers = identity, num_workers
        self._labeled = torch.zeros((), dtype=torch.long)  # number of pixels that were learned from
        self._images_seen = 0
        torch.manual_seed(seed)
        self.head = nn.Linear(encoder.width, len(benchmark.classes))
        self.counts: ConfusionMatrix | None = None
        self._share = ConfusionMatrix(len(benchmark.classes))

    def logits(self, image: Tensor) -> Tensor:
        """Return the logits on the patch grid (C, h, w) of an image (3, H, W) uint8."""
        scores: Tensor = self.head(self._encoder(image))
        return scores.permute(2, 0, 1).float()

    def training_step(self, batch: list[LabelledImage], batch_idx: int) -> Tensor:
        """Return the cross-entropy of an image, over its labeled pixels."""
        (image,) = batch
        logits = self.logits(image.image)
        labeled = (image.labels != IGNORED).sum()
        self._labeled += labeled
        self._images_seen += 1
        loss = pixel_loss(logits, image.labels.long()) / labeled.clamp(min=1)  # 0 without a labeled pixel
        self.log("loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def segment(self, image: Tensor) -> Tensor:
        """Return the segmentation map (H, W) of an image (3, H, W) uint8."""
        size, side = (image.shape[-2], image.shape[-1]), self._settings.crop_size
        logits = self.logits(image) if side is None else self._of_squares(image, side)
        classes = torch.arange(len(logits), device=logits.device)
        return label_map(StoredMaps(logits), classes, size, Thresholds())

    def _of_squares(self, image: Tensor, side: int) -> Tensor:
        """Return logits (C, H', W'), averaged over squares along the long side of the image resized to cover one."""
        height, width = image.shape[-2:]
        factor = side / min(height, width)
        size = [max(side, round(length * factor)) for length in (height, width)]
        resized = F.interpolate(image[None].cpu(), size, mode="bilinear", antialias=True)[0].to(image.device)
        canvas = self.head.weight.new_zeros(self.head.out_features, *size)
        counts = canvas.new_zeros(*size)
        for top in square_starts(size[0], side):
            for left in square_starts(size[1], side):
                window = slice(top, top + side), slice(left, left + side)
                logits = self.logits(resized[:, window[0], window[1]])
                canvas[:, window[0], window[1]] += F.interpolate(logits[None], (side, side), mode="bilinear")[0]
                counts[window] += 1
        return canvas / counts

    def on_fit_start(self) -> None:
        """Move the encoder to the device of this rank."""
        self._encoder.backbone.to(self.device)
        self._labeled = torch.zeros((), dtype=torch.long, device=self.device)

    def on_train_epoch_end(self) -> None:
        """Check that there is something to learn.

        Raises:
            UserError: No pixel of the training images is labeled.
        """
        # A run that continues begins at the end of the epoch of its checkpoint, without an image.
        labeled = self.trainer.strategy.reduce(self._labeled.clone(), reduce_op="sum")
        if self._images_seen and not labeled:
            raise UserError(f"{self._benchmark.name}: the training images have no labeled pixel. Check `labels`.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the layer depends on."""
        checkpoint["probe"] = self._identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of the same probe.

        Raises:
            UserError: It is not.
        """
        if checkpoint.get("probe") != self._identity:
            raise UserError(
                "The checkpoint is of another probe, network or benchmark. Set another --out, or delete the folder."
            )

    def on_validation_start(self) -> None:
        """Move the encoder to the device of this rank, and start counting."""
        self._encoder.backbone.to(self.device)
        self._share = ConfusionMatrix(len(self._benchmark.classes), self.device)

    def validation_step(self, batch: list[LabelledImage], batch_idx: int) -> None:
        """Segment an image and add it to the confusion matrix."""
        (image,) = batch
        index = self.trainer.global_rank + batch_idx * self.trainer.world_size
        self._share.update(self.segment(image.image), image.labels, index)

    def on_validation_epoch_end(self) -> None:
        """Log the mIoU over all ranks."""
        self.counts = self._share.all_ranks()
        assert sorted(self.counts.images) == list(range(len(self._benchmark)))
        result = self._benchmark.results(self.counts)
        self.log("mIoU", result.miou, prog_bar=True)
        self.log("pixel_accuracy", result.accuracy)

    def configure_optimizers(self) -> Any:
        """Return AdamW with polynomial decay."""
        settings = self._settings
        optimizer = AdamW(self.head.parameters(), settings.lr, weight_decay=settings.weight_decay)
        decay: Callable[[int], float] = lambda step: (1 - min(step / settings.steps, 1)) ** 0.9  # noqa: E731
        schedule = {"scheduler": LambdaLR(optimizer, decay), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def train_dataloader(self) -> DataLoader[LabelledImage]:
        """Return the images until the next evaluation; the Trainer asks for them after each."""
        settings = self._settings
        start = self.trainer.global_step
        stop = min((start // settings.check_every + 1) * settings.check_every, settings.steps)
        return one_by_one(self._images, self._workers, self.positions(start, stop))

    def positions(self, start: int, stop: int) -> range:
        """Return this rank's positions in the training images for the optimizer steps start..stop-1.

        A step covers the same positions for any number of ranks that divides its batch.
        """
        batch, trainer = self._settings.batch_size, self.trainer
        return range(start * batch + trainer.global_rank, stop * batch, trainer.world_size)

    def val_dataloader(self) -> DataLoader[LabelledImage]:
        """Return the images of the benchmark that this rank evaluates."""
        mine = range(self.trainer.global_rank, len(self._benchmark), self.trainer.world_size)
        return one_by_one(self._benchmark, self._workers, mine)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropy over the labeled pixels.

    The logits are resized to pixels (bilinear) in bands of rows, which are computed again in the backward pass, so that
    memory does not grow with classes times pixels.

    Args:
        logits: Logits on the patch grid (C, h, w), fp32.
        labels: Class ids (H, W), or `IGNORED`.
    """
    down = interpolation_matrix(logits.shape[1], labels.shape[0]).to(logits)  # (H, h)
    across = interpolation_matrix(logits.shape[2], labels.shape[1]).to(logits)  # (W, w)

    def band(logits: Tensor, rows: slice) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            pixels = torch.einsum("yh,chw,xw->cyx", down[rows], logits, across)
            return F.cross_entropy(pixels[None], labels[rows][None], ignore_index=IGNORED, reduction="sum")

    step = max(1, BAND // (logits.shape[0] * labels.shape[1]))
    starts = range(0, labels.shape[0], step)
    parts = [checkpoint(band, logits, slice(start, start + step), use_reentrant=False) for start in starts]
    return torch.stack(parts).sum()
