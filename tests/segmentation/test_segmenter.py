"""Tests of the segmenter: labels have the size of the image, for both kinds of inference."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from spar_lightning.backbones import Tiny
from spar_lightning.datasets.scene_renderer import CLASSES, render
from spar_lightning.errors import UserError
from spar_lightning.image.rows import ImageRows
from spar_lightning.refinement import LPOSS, AnyUp
from spar_lightning.segmentation.config import Inference, InferenceConfig
from spar_lightning.segmentation.label_map import Thresholds, bands, label_map
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.similarity import patch_similarities
from spar_lightning.sliding_window import SlidingWindow
from spar_lightning.student import load
from tests.rounding import assert_rounded


def tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


@pytest.fixture(scope="module")
def anyup(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return an AnyUp weight file with random weights."""
    path = tmp_path_factory.mktemp("anyup") / "anyup.pth"
    torch.manual_seed(0)
    torch.save(AnyUp(None).state_dict(), path)
    return str(path)


@pytest.mark.parametrize("size", [(64, 64), (65, 130), (1, 1), (7, 200), (96, 40)])
@pytest.mark.parametrize("inference", ["single", "sliding"])
def test_labels_have_the_size_of_the_image(size: tuple[int, int], inference: Inference) -> None:
    segmenter = Segmenter(Tiny(), CLASSES, InferenceConfig(inference, 16))
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
    assert right / total > 0.7  # random guessing: 1 / 12; always the most frequent class: 0.19


@pytest.mark.parametrize(("refined", "upsampled"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("inference", ["single", "sliding"])
def test_refinement_equals_its_steps(inference: Inference, refined: bool, upsampled: bool, anyup: str) -> None:
    """Compare with LPOSS and AnyUp applied to the patch similarities of one pass or of stitched features."""
    torch.manual_seed(0)
    backbone, refine, upsampler = Tiny(), LPOSS(gamma=4.0, k=30), AnyUp(anyup)
    image = torch.from_numpy(render(seed=5, index=2, height=90, width=130).image).permute(2, 0, 1)
    config = InferenceConfig(
        inference, 16, refine=refine if refined else None, upsampler=anyup if upsampled else "bilinear"
    )
    segmenter = Segmenter(backbone, CLASSES, config)
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
def test_refinement_of_any_size(size: tuple[int, int], anyup: str) -> None:
    segmenter = Segmenter(Tiny(), CLASSES, InferenceConfig(refine=LPOSS(), upsampler=anyup))
    assert segmenter(torch.randint(0, 256, (3, *size), dtype=torch.uint8)).shape == size


def test_thresholds_of_similarities_are_rejected_after_lposs(anyup: str) -> None:
    thresholds = Thresholds(probability=0.1)
    with pytest.raises(UserError, match="thresholds"):
        Segmenter(Tiny(), CLASSES, InferenceConfig(refine=LPOSS()), thresholds=thresholds)
    Segmenter(Tiny(), CLASSES, InferenceConfig(upsampler=anyup), thresholds=thresholds)


def test_only_the_network_runs() -> None:
    seen = []

    class Noted(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return super().forward(images)

    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    for config, passes in ((InferenceConfig(), [1]), (InferenceConfig("sliding", 16, 10), [10, 5])):  # 3 x 5 windows
        segmenter = Segmenter(Noted(), CLASSES, config)
        seen.clear()
        segmenter.run_network(segmenter.pixels(image))
        assert seen == passes


@pytest.mark.parametrize("inference", ["single", "sliding"])
def test_scores_are_those_that_decide(inference: Inference) -> None:
    classes = {"round": ["red dot", "blue dot"], "plain": ["plain"], "waves": ["waves"]}
    segmenter = Segmenter(Tiny(), classes, InferenceConfig(inference, 32, templates=["{}"]))
    image = render(seed=5, index=1, height=70, width=110).image
    labels, scores = segmenter(image, scores=True)
    assert scores.shape == (3, 70, 110) and scores.dtype == torch.float32
    assert torch.equal(labels, segmenter(image)) and torch.equal(labels, scores.argmax(0))
    single = Segmenter(
        Tiny(), ["red dot", "blue dot", "plain", "waves"], InferenceConfig(inference, 32, templates=["{}"])
    )
    of_names = single(image, scores=True)[1]
    torch.testing.assert_close(scores[0], of_names[:2].amax(0), rtol=0, atol=1e-5)  # similarities of 128 channels


def test_features_are_the_networks() -> None:
    image = torch.from_numpy(render(seed=5, index=1, height=64, width=96).image).permute(2, 0, 1)
    tiny = Tiny()
    pixels = tiny.normalize(image[None])
    with torch.no_grad():
        single, sliding = tiny(pixels)[0], SlidingWindow(tiny, 32)(pixels)[0]
    assert torch.equal(Segmenter(tiny, ["red dot"]).features(image), single)
    assert torch.equal(Segmenter(tiny, ["red dot"], InferenceConfig("sliding", 32)).features(image), sliding)
    with torch.no_grad():
        blended = SlidingWindow(tiny, 16, blend="hann")(pixels)[0]
    config = InferenceConfig("sliding", 16, blend="hann")
    assert torch.equal(Segmenter(tiny, ["red dot"], config).features(image), blended)


def test_the_long_side_is_bounded_and_labels_are_not() -> None:
    segmenter = Segmenter(Tiny(), ["red dot", "plain"], max_side=96)
    large, small = (render(seed=5, index=1, height=side, width=2 * side).image for side in (120, 40))
    assert segmenter.features(large).shape[:2] == (6, 12) and segmenter(large).shape == (120, 240)
    assert segmenter.features(small).shape[:2] == (5, 10)  # not enlarged


def test_threads_get_what_one_gets() -> None:
    segmenter = Segmenter(Tiny(), CLASSES)
    images = [render(seed=5, index=i, height=64 + 8 * i, width=90).image for i in range(8)]
    expected = [segmenter(image) for image in images]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            found = list(threads.map(segmenter, images))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [(200, 264), (201, 130), (128, 128), (50, 300), (5, 9)])
def test_blocks_are_the_single_pass_blended(size: tuple[int, int]) -> None:
    """Compare with windows of the size of a block whose neighbors share a quarter, with Hann weights."""
    backbone = Tiny()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    segmenter = Segmenter(backbone, CLASSES, InferenceConfig(block_size=130))  # 16 patches
    target = (max(1, round(size[0] / 8)) * 8, max(1, round(size[1] / 8)) * 8)
    fitted = torch.cat([rows for _, rows in bands([image.float()], size, target)], dim=1).round().to(torch.uint8)
    with torch.no_grad():
        expected = SlidingWindow(backbone, 96, 128, blend="hann")(backbone.normalize(fitted[None]))[0]
    found = segmenter.features(image)
    assert_rounded(found, expected, backbone.depth, 512)
    if size == (128, 128):
        assert_rounded(found, Segmenter(backbone, CLASSES).features(image), backbone.depth, 512)
    maps = torch.einsum("hwd,qd->qhw", F.normalize(found, dim=-1), segmenter.classifier.embeddings)
    labels, scores = segmenter(image, scores=True)
    assert_rounded(scores, F.interpolate(maps[None], size, mode="bilinear")[0], 1, 128)
    assert torch.equal(labels, scores.argmax(0))
    assert torch.equal(segmenter(image, dtype=torch.uint8), labels.byte())


def test_blocks_of_every_kind_of_image(tmp_path: Path) -> None:
    scene = render(seed=4, index=1, height=120, width=200).image
    Image.fromarray(scene).save(tmp_path / "a.png")
    segmenter = Segmenter(Tiny(), CLASSES, InferenceConfig(block_size=64), max_side=150)
    labels = [
        segmenter(image) for image in (scene, Image.fromarray(scene), tmp_path / "a.png", ImageRows.of(tensor(scene)))
    ]
    assert all(torch.equal(found, labels[0]) for found in labels) and labels[0].shape == (120, 200)
    assert segmenter.features(scene).shape[:2] == segmenter.grid((120, 200)) == (11, 19)  # 90 x 150 pixels
    whole = Segmenter(Tiny(), CLASSES)
    assert torch.equal(whole(ImageRows.of(tensor(scene))), whole(scene))


@pytest.mark.parametrize("thresholds", [Thresholds(probability=0.9), Thresholds(area=0.05)])
def test_thresholds_apply_to_blocks(thresholds: Thresholds) -> None:
    image = tensor(render(seed=4, index=2, height=150, width=150).image)
    config = InferenceConfig(block_size=64)
    plain, segmenter = (Segmenter(Tiny(), CLASSES, config, thresholds=used) for used in (None, thresholds))
    maps = patch_similarities(plain.features(image), plain.classifier.embeddings, None, 8)
    expected = label_map(maps, plain.classifier.owner, (150, 150), thresholds)
    assert torch.equal(segmenter(image), expected) and not torch.equal(plain(image), expected)


def test_settings_that_need_the_whole_image(anyup: str) -> None:
    for settings in ({"refine": LPOSS()}, {"upsampler": anyup}, {"patch_fit": "paper"}):
        with pytest.raises(UserError, match="block_size cannot be combined"):
            InferenceConfig(block_size=64, **settings)
    with pytest.raises(UserError, match="block_size"):
        InferenceConfig(block_size=0)
    assert Segmenter(Tiny(), CLASSES, InferenceConfig("sliding", 16, block_size=64)).blocks is None
    for wrong in ("large", 512.0, True):
        with pytest.raises(UserError, match="block_size must be a whole number"):
            InferenceConfig(block_size=wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="block_size 63 is smaller than the images of 64 pixels"):
        Segmenter(Tiny(), CLASSES, InferenceConfig(block_size=63))
    with pytest.raises(UserError, match="inference is sliding"):
        load("tiny", CLASSES, block_size=64, inference="sliding")


def test_a_large_image_in_one_pass_is_warned_about(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spar_lightning.segmentation.segmenter.MANY", 100)
    Segmenter(Tiny(), CLASSES).features(torch.zeros(3, 80, 80, dtype=torch.uint8))
    Segmenter(Tiny(), CLASSES, InferenceConfig(attention="windowed")).features(
        torch.zeros(3, 88, 88, dtype=torch.uint8)
    )
    assert not caplog.text
    Segmenter(Tiny(), CLASSES).features(torch.zeros(3, 80, 88, dtype=torch.uint8))
    assert "110 patches" in caplog.text and "block_size" in caplog.text and "max_side" in caplog.text
    caplog.clear()
    blocks = Segmenter(Tiny(), CLASSES, InferenceConfig(block_size=88))
    blocks.features(torch.zeros(3, 80, 300, dtype=torch.uint8))
    assert "110 patches" in caplog.text
