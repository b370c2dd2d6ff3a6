"""Tests of loading a segmenter from each kind of source."""

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import save_file

import spar_lightning as spar
from spar_lightning.backbones import OpenCLIP, Tiny
from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.errors import UserError
from spar_lightning.refinement import LPOSS
from spar_lightning.student import load_student

IMAGE = render(seed=3, index=0, height=64, width=88).image
CLASSES = "red dot; blue dot; background: plain, grain"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a run folder, as written by fit, of a student with a negated head."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    student = Tiny()
    with torch.no_grad():
        student.head.weight.neg_()
        student.head.bias.neg_()
    state = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    torch.save({"state_dict": state, "spar": {}}, folder / "checkpoints" / "last.ckpt")
    model = {"backbone": {"class_path": "spar_lightning.backbones.Tiny"}, "stride": 32, "templates": ["{}"], "lr": 0.1}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {}}))
    return folder


def test_sources_give_the_same_student(run: Path, tmp_path: Path) -> None:
    weights, config = tmp_path / "weights.safetensors", run / "config.yaml"
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    save_file({name.removeprefix("student."): tensor for name, tensor in state.items()}, weights)
    loaded = [
        spar.load(run, CLASSES),
        spar.load(str(run / "checkpoints" / "last.ckpt"), CLASSES.split(";")),
        spar.load(
            weights, {"red dot": ["red dot"], "blue dot": ["blue dot"], "background": ["plain", "grain"]}, config=config
        ),
    ]
    labels = loaded[0](IMAGE)
    assert loaded[0].classifier.labels == ("red dot", "blue dot", "background")
    assert all(torch.equal(each(IMAGE), labels) for each in loaded)
    base = spar.load("tiny", CLASSES, templates=["{}"])
    assert torch.equal(base.features(IMAGE), -loaded[0].features(IMAGE))


def test_settings_are_those_of_the_run_unless_given(run: Path) -> None:
    own = spar.load(run, "red dot")
    assert own.windows is None
    sliding = spar.load(run, "red dot; plain", inference="sliding", max_side=80)
    assert sliding.windows is not None and sliding.windows.stride == 32 and sliding.max_side == 80
    other = spar.load(run, "red dot", inference="sliding", stride=16, refine=LPOSS(k=5))
    assert other.windows is not None and other.windows.stride == 16
    assert not any(parameter.requires_grad for parameter in own.backbone.parameters())
    assert own.backbone.windowed is None
    windowed = spar.load(run, "red dot", attention="windowed")
    assert windowed.backbone.windowed == WindowedAttention()
    windows = spar.load(run, attention="windowed", inference="sliding")
    assert windows.backbone.windowed == WindowedAttention() and windows.windows is not None
    assert isinstance(windows.windows.backbone, Tiny) and windows.windows.backbone.windowed is None
    reach = spar.load(run, "red dot", attention=WindowedAttention(reach=2))
    assert reach.backbone.windowed is not None and reach.backbone.windowed.reach == 2
    image = torch.randint(256, (3, 128, 96), dtype=torch.uint8)
    assert not torch.equal(windowed.features(image), own.features(image))


def test_the_text_tower_goes_when_the_names_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Tiny] = []
    build = Tiny.build_text_tower
    monkeypatch.setattr(Tiny, "build_text_tower", lambda tiny: built.append(tiny) or build(tiny))  # type: ignore[func-returns-value]
    segmenter = spar.load(run, "red dot; blue dot")
    assert len(built) == 1 and not segmenter.backbone._text_tower
    assert spar.load(run).features(IMAGE).shape == (8, 11, 128) and len(built) == 1


def test_the_base_is_the_backbone_before_training(run: Path) -> None:
    """The base is right even for the head, which is changed here but not in the module's `trainable`."""
    student = load_student(run)
    base, fresh = student.base().state_dict(), Tiny().state_dict()
    assert all(torch.equal(base[name], fresh[name]) for name in fresh)
    assert torch.equal(student.backbone.state_dict()["head.weight"], -fresh["head.weight"])


def refused(make: Callable[[], object], *parts: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    for part in parts:
        assert part in str(error.value)


def test_base_weights_that_a_checkpoint_replaces_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load a run on weights from the hub offline, from its checkpoint only."""

    def refuse(*_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", refuse)
    trained = OpenCLIP("ViT-S-32", None)
    state = {f"student.{name}": tensor for name, tensor in trained.state_dict().items()}
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": state, "spar": {}}, tmp_path / "checkpoints" / "last.ckpt")
    arguments = {"model": "ViT-S-32", "pretrained": "laion400m_e31"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: {"hf_hub": "a/b"})
    model = {"backbone": {"class_path": "spar_lightning.backbones.OpenCLIP", "init_args": arguments}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    loaded = spar.load(tmp_path).backbone.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.state_dict().items())
    with pytest.raises(UserError, match="laion400m_e31"):
        load_student(tmp_path).base()  # the base needs those weights


def test_what_does_not_fit_is_a_sentence(run: Path, tmp_path: Path) -> None:
    save_file(Tiny().state_dict(), tmp_path / "plain.safetensors")
    refused(lambda: spar.load(tmp_path / "plain.safetensors"), "plain.safetensors", "config=..", "--config")
    refused(lambda: spar.load(tmp_path), str(tmp_path))
    refused(lambda: spar.load("runs/mien", config=run / "config.yaml"), "runs/mien")
    refused(lambda: spar.load("siglip2", config=run / "config.yaml"), "siglip2")
    refused(lambda: spar.load("./no.safetensors"), "./no.safetensors")
    refused(lambda: spar.load("train.ckpt"), "train.ckpt")
    refused(lambda: spar.load(run, device="gpu"), "device gpu", "cpu, cuda")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs")
    refused(lambda: spar.load(tmp_path / "lfs.safetensors"), "lfs.safetensors")
    (tmp_path / "broken.yaml").write_text("a: [")
    refused(lambda: spar.load(run, config=tmp_path / "broken.yaml"), "broken.yaml")
    refused(lambda: spar.load("tini"), "tini", "mean Tiny")
    refused(lambda: spar.load(run, config=tmp_path / "no.yaml"), "no.yaml")
    refused(lambda: spar.load(run, "red dot", stride=100), "stride 100")
    refused(lambda: spar.load(run, "red dot", max_side=0), "max_side")
    refused(lambda: spar.load(run, backbone={"size": 3}), "'size'")
    refused(lambda: spar.load(run)(IMAGE), "classes")
    refused(lambda: spar.load(run, "zebra"), "'zebra'")
    (tmp_path / "empty.yaml").write_text("data: {}")
    refused(lambda: spar.load(run, config=tmp_path / "empty.yaml"), "model.backbone")
    torch.save({"state_dict": {"student.x": torch.zeros(1)}, "spar": {}}, tmp_path / "other.ckpt")
    refused(lambda: spar.load(tmp_path / "other.ckpt", config=run / "config.yaml"), "other.ckpt")


def test_random_weights_are_refused_or_told(run: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    refused(lambda: spar.load("dinov3text"), "dinov3text", "backbone_weights", "8aa4cbdd.pth", "https://")
    spar.load(run)
    assert not caplog.records
    spar.load("tiny", backbone={"pretrained": None})
    (tmp_path / "random.yaml").write_text("model: {backbone: {class_path: Tiny, init_args: {pretrained: null}}}")
    spar.load("tiny", config=tmp_path / "random.yaml")
    assert [record.name for record in caplog.records] == ["spar_lightning"] * 2
    assert caplog.text.count("Tiny has random weights") == 2


@pytest.mark.parametrize("backbone", ["3", "[Tiny]", "{init_args: {}}", "{class_path: Tiny, init_args: 3}"])
def test_a_configuration_without_a_class(backbone: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"model: {{backbone: {backbone}}}")
    refused(lambda: spar.load(run, config=tmp_path / "a.yaml"), "a.yaml", "model.backbone")
