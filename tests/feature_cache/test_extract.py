"""Tests of computing samples in advance: order, limit, and errors."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from spar_lightning.backbones import Tiny
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.datasets.shard_index import scan
from spar_lightning.distillation import Distillation
from spar_lightning.feature_cache.extract import TeacherFeatures, ahead
from spar_lightning.feature_cache.shard import Entry
from spar_lightning.image import codec


def test_results_come_in_order_and_not_too_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            taken.append(i)
            yield i

    for i, result in enumerate(ahead(lambda x: x * x, items(), 3)):
        assert result == i * i
        assert len(taken) <= i + 4


def test_work_runs_beside_what_uses_it() -> None:
    second = threading.Event()

    def work(i: int) -> int:
        if i == 1:
            second.set()
        return i

    results = ahead(work, range(3), 1)
    assert next(results) == 0
    assert second.wait(10)  # computed before it is requested


def test_an_error_comes_in_the_place_of_its_result() -> None:
    results = ahead(lambda x: 1 // (2 - x), range(5), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_every_image_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check also that the stored image decodes to the image that the teacher processed."""
    for i in range(3):
        Image.fromarray(render(0, i, 72, 96).image).save(tmp_path / f"{i}.png")
    decoded, seen = [], []
    from_pillow = codec.from_pillow

    def noted(image: Image.Image, *others: Any) -> Tensor:
        decoded.append(image)
        return from_pillow(image, *others)

    class Spy(TeacherFeatures):
        def features(self, image: Tensor) -> Tensor:
            seen.append(image)
            return super().features(image)

    monkeypatch.setattr(codec, "from_pillow", noted)
    teacher = Distillation(Tiny(), stride=32)
    make = Spy(teacher, Augmentation("small"), 0, "float16", torch.device("cpu"), torch.no_grad)
    images = scan(str(tmp_path))
    made = list(make(images[i] for i in range(3)))
    assert len(decoded) == 3
    for entry, image in zip(made, seen, strict=True):
        assert isinstance(entry, Entry) and torch.equal(codec.decode_image(entry.content), image)
