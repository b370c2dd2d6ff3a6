"""Any image size gives labels at the image's size, in both ways of inference."""

import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.datamodules.scenes import CLASSES, render
from spar_lightning.segmenter import Segmenter


@pytest.mark.parametrize("size", [(64, 64), (65, 130), (1, 1), (7, 200), (96, 40)])
@pytest.mark.parametrize("inference", ["single", "sliding"])
def test_labels_have_the_size_of_the_image(size: tuple[int, int], inference: str) -> None:
    segmenter = Segmenter(Tiny(), CLASSES, inference, stride=16)  # type: ignore[arg-type]
    labels = segmenter(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
    assert labels.shape == size
    assert 0 <= int(labels.min()) <= int(labels.max()) < len(CLASSES)


def test_the_shipped_weights_segment_scenes_at_the_native_size() -> None:
    segmenter = Segmenter(Tiny(), CLASSES)
    right = total = 0
    for i in range(20):
        scene = render(seed=77, index=i, height=64, width=64)
        labels = segmenter(torch.from_numpy(scene.image).permute(2, 0, 1))
        right += int((labels.numpy() == scene.labels).sum())
        total += labels.numel()
    assert right / total > 0.7  # chance is 1 / 12, always the commonest class 0.19
