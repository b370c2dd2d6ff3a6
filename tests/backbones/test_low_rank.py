"""LoRA: unchanged features at the start, only the updates train, and readers of weights get the merged network."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import spar_lightning as spar
from spar_lightning.backbones import Tiny
from spar_lightning.backbones.low_rank import add_low_rank, merge, merged, plain
from spar_lightning.backbones.weights import read
from spar_lightning.cli import main
from spar_lightning.errors import UserError
from tests.rounding import assert_rounded
from tests.test_distillation import module, sample
from tests.testing.test_checks import FAMILIES, built


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_of_every_family(family: str, small_naflex: str) -> None:
    plain = copy.deepcopy(built(family, small_naflex))
    for name, p in plain.named_parameters():
        if "gamma" in name:  # LayerScale starts at 1e-5, which would hide every change
            nn.init.ones_(p)
    network = copy.deepcopy(plain)
    add_low_rank(network, [p for name, ps in network.parameter_groups().items() if "block" in name for p in ps], 2)
    images = torch.randn(1, 3, 2 * plain.patch_size, 3 * plain.patch_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(images), plain(images))
    assert network.weights_digest() == plain.weights_digest()

    trained = [p for p in network.parameters() if p.requires_grad]
    features = network(images)
    features.square().sum().backward()
    assert trained and all(p.grad is not None for p in trained)
    assert sum(p.numel() for p in trained) < 0.1 * sum(p.numel() for p in plain.parameters())

    with torch.no_grad():
        for p in trained:
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        changed = network(images)
        assert (changed - features).abs().max() > 1e-3
        plain.load_vision_state_dict(merged(network.vision_state_dict()))
        assert_rounded(plain(images), changed, plain.depth, plain.embed_dim)
        assert plain.weights_digest() == network.weights_digest()


def test_the_teacher_and_its_cache_key_are_those_without_lora() -> None:
    plain, lora = module(), module(trainable=["blocks.*"], lora_rank=4)
    assert lora.teacher_identity() == plain.teacher_identity()
    assert torch.equal(lora.batch_loss([sample()]), plain.batch_loss([sample()]))
    names = {name.split(".")[-1] for name, p in lora.student.named_parameters() if p.requires_grad}
    assert names == {"up", "down"}
    with torch.no_grad():
        for p in lora.student.parameters():
            p.add_(0.1 * p.requires_grad)
    assert lora.teacher_identity() == plain.teacher_identity()
    pixels = lora.student.normalize(sample().image[None])
    assert torch.equal(lora.build_teacher()(pixels), plain.build_teacher()(pixels))


def test_a_merged_copy_leaves_the_network_as_it_is() -> None:
    network = Tiny()
    add_low_rank(network, list(network.parameters()), 2)
    nn.init.ones_(network.blocks[3].mlp.fc1.parametrizations.weight[0].up)  # type: ignore[union-attr, index]
    images = torch.randn(1, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    expected, copied = network(images), copy.deepcopy(network)
    merge(copied)
    assert copied.state_dict().keys() == Tiny().state_dict().keys()
    assert type(copied.blocks[3].mlp.fc1) is nn.Linear  # type: ignore[union-attr]
    assert torch.equal(copied(images), expected) and torch.equal(network(images), expected)


def test_other_parametrizations_keep_their_names() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert merged(layer.state_dict()).keys() == layer.state_dict().keys()
    assert plain(layer) is layer
    assert plain(Tiny()).state_dict().keys() == Tiny().state_dict().keys()


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one(rank: int) -> None:
    with pytest.raises(UserError, match=f"model.lora_rank must be at least 1, but got {rank}"):
        module(lora_rank=rank)


def test_a_selection_without_linear_layers() -> None:
    with pytest.raises(UserError, match=r'model.trainable selects none. Set it to blocks, such as \["blocks.\*"\]'):
        module(trainable=["pos_embed"], lora_rank=4)


@pytest.mark.slow
def test_fit_resume_load_and_export(
    small: list[str], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fit = ["fit", *small, "--data.root", str(scenes), "--mean_iou.before", "false", "--mean_iou.teacher", "false"]
    fit += ["--run_dir", str(run)]
    lora = ["--model.trainable", "[blocks.*]", "--model.lora_rank", "4"]
    assert main([*fit, *lora, "--trainer.max_epochs", "1"]) == 0
    assert main([*fit, *lora, "--resume", "auto"]) == 0
    assert main([*fit, "--model.trainable", "[blocks.*]", "--resume", "auto"]) == 2
    assert "trained with model.lora_rank 4, but it is null" in capsys.readouterr().err

    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    start = Tiny().state_dict()
    for name, tensor in content["state_dict"].items():
        if name.endswith(".original"):  # the updated weights themselves stay as they were
            assert torch.equal(tensor, start[name[8:].replace("parametrizations.", "").removesuffix(".original")])

    weights = read(str(run / "checkpoints" / "last.ckpt"))
    assert weights.keys() == start.keys()
    assert not torch.equal(weights["blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])
    assert torch.equal(weights["blocks.0.norm1.weight"], start["blocks.0.norm1.weight"])
    # Commands that take the configuration of the run build the plain network.
    results = json.loads((run / "results.json").read_text())[-1]["miou"]
    last = str(run / "checkpoints" / "last.ckpt")
    assert main(["validate", "--weights", last, "--config", str(run / "config.yaml")]) == 0
    shown = capsys.readouterr().out
    assert all(f"{miou:.1f}" in shown for miou in results.values())
    benchmark = ["--benchmarks", str(scenes / "seed-0" / "scenes_64"), "--weights", str(run)]
    assert main(["evaluate", *benchmark, "--out", str(tmp_path / "evaluated")]) == 0
    sweep = ["--strides", "64", "--repeats", "1", "--warm_ups", "0", "--out", str(tmp_path / "sweep")]
    assert main(["evaluate", *benchmark, *sweep]) == 0
    exported = tmp_path / "student.safetensors"
    assert main(["export", "--weights", str(run), "--to", "safetensors", "--out", str(exported)]) == 0
    image = sample(96, 80).image
    assert torch.equal(spar.load(exported).features(image), spar.load(run).features(image))
    assert not torch.equal(spar.load(run).features(image), spar.load("tiny").features(image))
