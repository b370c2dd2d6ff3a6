"""Tests of AnyUp: equality with a plain implementation that uses the full mask, and official weight files."""

import copy
import json
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.backbones.weights import WeightsError
from spar_lightning.errors import UserError
from spar_lightning.refinement import AnyUp, anyup_attention, anyup_encoders
from spar_lightning.refinement.base import BAND
from spar_lightning.segmentation.similarity import GuidedMaps
from tests.rounding import assert_rounded, rounding

SHAPES: dict[str, list[int]] = json.loads((Path(__file__).parents[1] / "data" / "anyup_keys.json").read_text())


def official_file(path: Path, seed: int = 0) -> Path:
    """Write random weights, including norms and biases, in the layout of the official files."""
    state, generator = AnyUp(None).state_dict(), torch.Generator().manual_seed(seed)
    noise = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items() if len(shape) == 1}
    torch.save({name: state[name] + noise.get(name, 0) for name in SHAPES}, path)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> AnyUp:
    return AnyUp(str(official_file(tmp_path_factory.mktemp("anyup") / "anyup_multi_backbone.pth")))


def residual(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x
    for norm, conv in ((0, 2), (3, 5)):
        y = F.silu(F.group_norm(y, 8, w[f"{name}.block.{norm}.weight"], w[f"{name}.block.{norm}.bias"]))
        y = F.conv2d(y, w[f"{name}.block.{conv}.weight"])
    return x + y


def encoder(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return residual(w, f"{name}.2", residual(w, f"{name}.1", x))


def dense(w: dict[str, Tensor], image: Tensor, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Run AnyUp in plain steps, with a mask of all pixels times all patches and nn.MultiheadAttention."""
    (height, width), (h, w_), channels = image.shape[-2:], maps.shape[-2:], maps.shape[1]
    x = encoder(w, "image_encoder", F.conv2d(image, w["image_encoder.0.weight"]))
    rows, columns = torch.meshgrid(
        *(torch.linspace(0, 1, n, dtype=image.dtype) for n in (height, width)), indexing="ij"
    )
    angle = torch.einsum("ahw,ac->chw", torch.stack([rows, columns]), w["rope.freqs"])
    x = x * angle.cos() + torch.cat([-x[:, 64:], x[:, :64]], dim=1) * angle.sin()
    query = encoder(w, "query_encoder", F.conv2d(x, w["query_encoder.0.weight"]))
    query = F.conv2d(F.adaptive_avg_pool2d(query, size), w["cross_decode.conv2d.weight"], padding=1)
    key = F.adaptive_avg_pool2d(encoder(w, "key_encoder", F.conv2d(x, w["key_encoder.0.weight"])), (h, w_))
    kernels = w["key_features_encoder.0.basis"]
    unit = F.normalize(maps, dim=1)[0][:, None]  # (C, 1, h, w)
    response = F.conv2d(unit, kernels, padding=2) / F.conv2d(
        torch.ones(1, 1, h, w_).to(image), torch.ones(1, 1, 5, 5).to(image), padding=2
    )
    response = response.reshape(1, 128, channels, h, w_).softmax(1).mean(2)
    key = torch.cat([key, encoder(w, "key_features_encoder", response)], dim=1)
    key = F.conv2d(F.pad(key, [1] * 4, mode="reflect"), w["aggregation.0.weight"])
    key = encoder(w, "aggregation", key)

    attention = torch.nn.MultiheadAttention(128, 4, batch_first=True, dtype=image.dtype)
    part = "cross_decode.cross_attn"
    attention.load_state_dict({k.removeprefix(f"{part}.attention."): v for k, v in w.items() if "attention" in k})
    query, key = (t.flatten(2).transpose(1, 2) for t in (query, key))
    query, key = (F.rms_norm(t, (128,), w[f"{part}.norm_{n}.weight"]) for t, n in ((query, "q"), (key, "k")))
    seen = []
    for pixels, patches in zip(size, (h, w_), strict=True):
        position = (torch.arange(pixels) + 0.5) / pixels
        first, last = (((position + d).clamp(0, 1) * patches)[:, None] for d in (-0.1, 0.1))
        index = torch.arange(patches)
        seen.append((index >= first.floor()) & (index < last.ceil()))
    mask = ~(seen[0][:, None, :, None] & seen[1][None, :, None, :]).reshape(size[0] * size[1], h * w_)
    _, weights = attention(query, key, key, attn_mask=mask)
    upsampled: Tensor = (weights @ maps.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, size)
    return upsampled


CASES = [
    ((64, 96), (8, 12), 5, None),
    ((97, 33), (7, 3), 150, None),
    ((40, 240), (5, 30), 1, None),  # 6:1
    ((30, 30), (40, 40), 3, None),  # fewer pixels than patches
    ((64, 64), (8, 8), 128, (32, 160)),
]


@pytest.mark.parametrize(("pixels", "patches", "channels", "size"), CASES)
def test_equals_the_whole_mask(
    network: AnyUp, pixels: tuple[int, int], patches: tuple[int, int], channels: int, size: tuple[int, int] | None
) -> None:
    image, maps = torch.randn(1, 3, *pixels), torch.randn(1, channels, *patches)
    for exact, dtype in ((network, torch.float32), (copy.deepcopy(network).double(), torch.float64)):
        with torch.no_grad():
            expected = dense(exact.state_dict(), image.to(dtype), maps.to(dtype), size or pixels)
        found = exact(image.to(dtype), maps.to(dtype), size)
        assert found.std() > 0.05 * maps.std()
        assert (found - expected).abs().max() < rounding(expected, 8, 128, dtype)


def test_bands_and_pieces_change_nothing(network: AnyUp, monkeypatch: pytest.MonkeyPatch) -> None:
    image, maps = torch.randn(1, 3, 50, 90), torch.randn(1, 9, 6, 11)
    whole = network(image, maps)
    for band in (1 << 12, 1 << 9):
        monkeypatch.setattr(anyup_encoders, "BAND", band)
        monkeypatch.setattr(anyup_attention, "BAND", band)
        assert_rounded(network(image, maps), whole, 8, 128)
    assert band < BAND


def test_some_names_are_rows_of_all(network: AnyUp) -> None:
    image, maps = torch.randn(3, 48, 80), torch.randn(9, 6, 10)
    guided, whole = GuidedMaps(network, image, maps), network(image[None], maps[None])[0]
    assert guided.size == (48, 80)
    found = torch.cat(list(guided.rows(torch.tensor([7, 2]))), dim=1)
    assert_rounded(found, whole[[7, 2]], 1, 128)


def test_averages(network: AnyUp) -> None:
    """Check that constants are preserved and that all values stay in the range of the maps."""
    image = torch.randn(2, 3, 72, 40)
    constants = torch.tensor([3.0, -0.25])[None, :, None, None].expand(2, 2, 9, 5)
    assert_rounded(network(image, constants), constants[..., :1, :1].expand(2, 2, 72, 40), 1, 128)
    maps = torch.rand(2, 4, 9, 5)
    found = network(image, maps)
    assert found.shape == (2, 4, 72, 40) and found.min() >= 0 and found.max() <= 1


def test_a_grid_of_one_patch(network: AnyUp) -> None:
    maps = torch.randn(1, 6, 1, 1)
    assert_rounded(network(torch.randn(1, 3, 8, 8), maps), maps.expand(1, 6, 8, 8), 1, 128)


def test_half_precision_stays_near(network: AnyUp) -> None:
    image, maps = torch.randn(1, 3, 32, 48), torch.randn(1, 20, 4, 6)
    whole = network(image, maps)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(image, maps)
    assert half.dtype == torch.float32
    assert 1e-3 < (half - whole).norm() / whole.norm() < 0.1  # measured: 0.03, with 8 bits of precision


def test_keys_and_shapes_are_the_official_ones(network: AnyUp) -> None:
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == SHAPES
    assert sum(parameter.numel() for parameter in network.parameters()) == 878_080
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_file_loads_strictly(tmp_path: Path) -> None:
    path = official_file(tmp_path / "anyup_paper.pth", seed=1)
    tensors = torch.load(path, weights_only=True)
    loaded = AnyUp(str(path))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.identity() != AnyUp(str(official_file(tmp_path / "other.pth", seed=2))).identity()
    del tensors["rope.freqs"]
    torch.save(tensors, path)
    with pytest.raises(WeightsError, match=r"AnyUp: rope\.freqs .*\(2, 128\)"):
        AnyUp(str(path))


def test_official_weights_come_from_their_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(url: str, path: str, progress: bool) -> None:
        asked.append(url)
        if "multi" in url:
            raise URLError("no network")
        official_file(Path(path))

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert AnyUp().identity() == AnyUp().identity()
    assert len(asked) == 1 and asked[0].endswith("/checkpoint/anyup_paper.pth")  # the second one is read from disk
    with pytest.raises(WeightsError, match=r"anyup_multi_backbone .*no network"):
        AnyUp("anyup_multi_backbone")
    kept = tmp_path / "hub" / "checkpoints" / "anyup_paper.pth"
    kept.write_text("<html>a page of a proxy</html>")
    with pytest.raises(WeightsError, match=f"{kept}"):
        AnyUp("anyup")


def test_a_name_that_is_none() -> None:
    with pytest.raises(UserError, match=r"upsampler: 'anypu' .*anyup"):
        AnyUp("anypu")
