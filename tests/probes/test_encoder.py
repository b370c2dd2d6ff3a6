"""Tests of the patch features that probes see."""

import pytest
import torch
from torch import Tensor, nn

from spar_lightning.backbones import Backbone, Tiny
from spar_lightning.errors import UserError
from spar_lightning.probes.encoder import PatchEncoder
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter
from tests.testing.test_checks import FAMILIES, built


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_features_are_the_output_of_the_final_norm(family: str, small_naflex: str) -> None:
    backbone = built(family, small_naflex)
    side = 3 * backbone.patch_size
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    seen: list[Tensor] = []
    with backbone.final_norm().register_forward_hook(lambda module, args, output: seen.append(output)), torch.no_grad():
        backbone(backbone.normalize(image[None]))
    encoder = PatchEncoder(backbone, InferenceConfig(), "trunk")
    features = encoder(image)
    assert features.shape == (3, 3, encoder.width)
    expected = seen[0][0][-9:]  # patches come last; whether class tokens reach the norm depends on the family
    assert torch.allclose(features.flatten(0, 1), expected, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [InferenceConfig(), InferenceConfig("sliding", stride=16), InferenceConfig("sliding", stride=16, blend="hann")],
)
def test_dense_features_are_those_of_a_segmenter(settings: InferenceConfig) -> None:
    backbone, image = Tiny(), torch.randint(0, 256, (3, 90, 101), dtype=torch.uint8)
    features = PatchEncoder(backbone, settings, "dense")(image)
    assert torch.equal(features, Segmenter(backbone, ["red dot"], settings).features(image))


def test_sliding_windows_over_the_trunk() -> None:
    """An image of the window's size has one window."""
    backbone, image = Tiny(), torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    single, sliding = (PatchEncoder(backbone, InferenceConfig(mode))(image) for mode in ("single", "sliding"))
    assert torch.allclose(single, sliding, atol=1e-5)


def test_attention_is_that_of_the_settings() -> None:
    backbone, image = Tiny(), torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)
    full, windowed = (PatchEncoder(backbone, InferenceConfig(attention=kind))(image) for kind in ("full", "windowed"))
    assert not torch.allclose(full, windowed, atol=1e-2)


class Nameless(Tiny):
    """Backbone of a plugin that does not define its final norm."""

    def final_norm(self) -> nn.Module:
        return Backbone.final_norm(self)


def test_a_backbone_without_a_final_norm_has_dense_features_only() -> None:
    with pytest.raises(UserError, match=r"Nameless does not define final_norm.*--features dense"):
        PatchEncoder(Nameless(), InferenceConfig())
    assert PatchEncoder(Nameless(), InferenceConfig(), "dense").width == 128
    with pytest.raises(UserError, match="trunk or dense"):
        PatchEncoder(Tiny(), InferenceConfig(), "both")  # type: ignore[arg-type]
