"""`spar speed train`: training steps with and without cached activations and packing, against the published step."""

from collections.abc import Iterator
from typing import Final

import torch

from spar_lightning.backbones.base import Backbone
from spar_lightning.datasets.samples import ActivationSample, Sample
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError
from spar_lightning.speed import published
from spar_lightning.speed.bench import PHOTO, Bench, operations
from spar_lightning.speed.comparison import Comparison

PACK: Final = 4  # images per packed sequence
DRAWS: Final = 99  # drawn image sizes; the median one is used for steps on one image


class Ours:
    """Training steps of our implementation on fixed samples.

    Args:
        bench: Settings; a copy of its student is trained.
        batches: Batches of samples, one per step.
    """

    def __init__(self, bench: Bench, batches: list[list[Sample]] | list[list[ActivationSample]]) -> None:
        self.bench, self.batches = bench, batches
        of = bench.module
        self.module = Distillation(bench.student(), loss=of.loss, attention=of.config.attention)
        for ours, theirs in zip(self.module.student.parameters(), of.student.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)  # of `trainable` or of LoRA
        self.module.to(bench.device)
        self.optimizer = published.adamw(self.module.student.parameters(), of.lr, of.weight_decay)

    def __call__(self) -> None:
        """Run one step per batch."""
        for batch in self.batches:
            with self.bench.context():
                loss = self.module.batch_loss(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def train(bench: Bench) -> Iterator[Comparison]:
    """Compare steps on one image, then steps on several images, one by one and packed."""
    if not bench.module.scale.keeps_size:
        raise UserError("spar speed train measures images of one size. Set model.student_scale to [1, 1].")
    yield _single(bench)
    yield _packs(bench)


def _single(bench: Bench) -> Comparison:
    size = sorted(_sizes(bench, DRAWS), key=lambda sides: sides[0] * sides[1])[DRAWS // 2]
    sample = _sample(bench, *size)
    assert sample.features is not None
    cached, target = _activations(bench, sample), sample.features
    whole, rest = _operations(bench, sample), _operations(bench, cached)
    image = bench.module.student.normalize(sample.image)
    training = published.Training(bench.student().with_attention(None), bench.module.lr, bench.module.weight_decay)
    ways = {
        **bench.published(lambda: training.step(image, target), whole),
        f"whole network, {bench.precision}": bench.way(Ours(bench, [[sample]]), whole),
        f"cached activations, {bench.precision}": bench.way(Ours(bench, [[cached]]), rest),
    }
    return bench.compare(f"step on {size[0]} x {size[1]}", "images", 1, ways)


def _packs(bench: Bench) -> Comparison:
    sizes = _sizes(bench, PACK)
    samples = [_sample(bench, *size) for size in sizes]
    cached = [_activations(bench, sample) for sample in samples]
    whole, rest = (sum(_operations(bench, sample) for sample in each) for each in (samples, cached))
    ways = {
        "whole network, one by one": bench.way(Ours(bench, [[sample] for sample in samples]), whole),
        "whole network, packed": bench.way(Ours(bench, [samples]), whole),
        "cached activations, one by one": bench.way(Ours(bench, [[sample] for sample in cached]), rest),
        "cached activations, packed": bench.way(Ours(bench, [cached]), rest),
    }
    title = f"steps on {', '.join(f'{h} x {w}' for h, w in sizes)}, {bench.precision}"
    return bench.compare(title, "images", PACK, ways)


def _sizes(bench: Bench, count: int) -> list[tuple[int, int]]:
    """Return height and width of training images as drawn by the augmentation; they are the same in every run."""
    draws = [bench.augmentation.draw(*PHOTO, 0, f"sa_{i}") for i in range(1, count + 1)]
    return [(draw.crop_height, draw.crop_width) for draw in draws]


def _sample(bench: Bench, height: int, width: int) -> Sample:
    """Return a random image with random features on the device, in the format of a cache."""
    student = bench.module.student
    grid = (height // student.patch_size, width // student.patch_size)
    features = torch.randn(*grid, student.embed_dim, device=bench.device).half()
    return Sample("sa_1", bench.noise(height, width), features)


def _activations(bench: Bench, sample: Sample) -> ActivationSample:
    assert sample.features is not None
    with torch.no_grad(), bench.context():
        tokens = bench.module.build_activations(bench.device)(sample.image[None])[0]
    return ActivationSample(sample.key, tokens.half(), sample.features)


def _operations(bench: Bench, sample: Sample | ActivationSample) -> float:
    """Count the operations of a training step (forward and backward) on one image."""
    assert sample.features is not None
    grids = [(sample.features.shape[0], sample.features.shape[1])]

    def step(net: Backbone, meta: torch.device) -> None:
        if isinstance(sample, ActivationSample):
            tokens = torch.zeros(1, *sample.tokens.shape, device=meta)
            features = net.project(net.run_blocks(tokens, grids, bench.module.frozen_blocks), grids)
        else:
            features = net(torch.zeros(1, *sample.image.shape, device=meta))
        features.sum().backward()

    return operations(bench.module.student, step)
