"""Any image size gives labels at the image's size, in both ways of inference."""

import pytest
import torch
import torch.nn.functional as F

from spar_lightning.backbones import Tiny
from spar_lightning.datamodules.scenes import CLASSES, render
from spar_lightning.errors import UserError
from spar_lightning.label_map import Thresholds
from spar_lightning.refine import LPOSS, AnyUp
from spar_lightning.segmenter import Inference, Segmenter
from spar_lightning.sliding_window import SlidingWindow


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


@pytest.mark.parametrize(("refined", "upsampled"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("inference", ["single", "sliding"])
def test_refinement_equals_its_steps(inference: Inference, refined: bool, upsampled: bool) -> None:
    """LPOSS and AnyUp on the cosines of the patch grid, of one pass or of stitched features."""
    torch.manual_seed(0)
    backbone, refine, upsampler = Tiny(), LPOSS(gamma=4.0, k=30), AnyUp(None)
    image = torch.from_numpy(render(seed=5, index=1, height=90, width=130).image).permute(2, 0, 1)
    segmenter = Segmenter(
        backbone, CLASSES, inference, 16,
        refine=refine if refined else None, upsampler=upsampler if upsampled else None,
    )  # fmt: skip
    pixels = F.interpolate(backbone.normalize(image[None]), (88, 128), mode="bilinear")
    with torch.no_grad():
        features = (backbone if inference == "single" else SlidingWindow(backbone, 16))(pixels)[0]
    text = segmenter.classifier.embeddings
    maps = torch.einsum("hwd,qd->qhw", F.normalize(features, dim=-1), text)
    if refined:
        maps = refine(features, maps, 8)
    if upsampled:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
        mean_, std_ = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        maps = upsampler((pixels * std + mean - mean_) / std_, maps[None])[0]
    expected = F.interpolate(maps[None], (90, 130), mode="bilinear")[0].argmax(0)
    found = segmenter(image)
    assert torch.equal(found, expected)
    assert len(found.unique()) > 2


@pytest.mark.parametrize("size", [(1, 1), (7, 200)])
def test_refinement_of_any_size(size: tuple[int, int]) -> None:
    segmenter = Segmenter(Tiny(), CLASSES, refine=LPOSS(), upsampler=AnyUp(None))
    assert segmenter(torch.randint(0, 256, (3, *size), dtype=torch.uint8)).shape == size


def test_thresholds_of_cosines_are_refused_after_lposs() -> None:
    with pytest.raises(UserError, match="thresholds are those of cosines"):
        Segmenter(Tiny(), CLASSES, thresholds=Thresholds(probability=0.1), refine=LPOSS())
    Segmenter(Tiny(), CLASSES, thresholds=Thresholds(probability=0.1), upsampler=AnyUp(None))


def test_only_the_network_runs() -> None:
    seen = []

    class Noted(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return super().forward(images)

    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    for inference, passes in (("single", [1]), ("sliding", [10, 5])):
        segmenter = Segmenter(Noted(), CLASSES, inference, 16, batch_size=10)  # type: ignore[arg-type]  # 3 x 5 windows
        seen.clear()
        segmenter.run_network(segmenter.pixels(image))
        assert seen == passes
