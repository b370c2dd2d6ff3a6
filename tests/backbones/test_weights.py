"""Weight files of all supported layouts are read, and errors name the tensor that does not match."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spar_lightning.backbones import OpenCLIP, SigLIP2
from spar_lightning.backbones.weights import WeightsError, read

MODEL = "ViT-S-32"
LogCapture = pytest.LogCaptureFixture


def features(backbone: OpenCLIP) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = backbone(torch.ones(1, 3, 64, 96))
        return out


@pytest.fixture(scope="module")
def student() -> OpenCLIP:
    torch.manual_seed(1)
    return OpenCLIP(MODEL, pretrained=None)


@pytest.mark.parametrize(
    "wrapper", ["", "model.", "segmentor.net.model.", "student.", "_orig_mod.", "module._orig_mod.", "model.module."]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_files_of_every_origin(student: OpenCLIP, wrapper: str, suffix: str, tmp_path: Path) -> None:
    tensors = {wrapper + name: tensor.clone() for name, tensor in student.vision_state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:  # Lightning adds its own keys
        torch.save({"state_dict": tensors, "epoch": 3} if suffix == ".ckpt" else tensors, path)
    assert torch.equal(features(OpenCLIP(MODEL, pretrained=str(path))), features(student))


CONTAINERS: list[Callable[[dict[str, torch.Tensor]], object]] = [
    lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
    lambda state: {"model_state_dict": state},
    lambda state: {"net": {f"module.{name}": tensor for name, tensor in state.items()}},
    lambda state: {"params": {name.replace("resblocks.0.", "resblocks.0._orig_mod."): t for name, t in state.items()}},
    lambda state: {"ema": {"module": state}, "config": {"model": "x"}},
    lambda state: {"teacher": state, "params": {"lr": 0.1}},
    lambda state: {name.removeprefix("visual."): tensor for name, tensor in state.items()},
]


@pytest.mark.parametrize("wrap", CONTAINERS)
def test_checkpoints_of_other_trainers(
    student: OpenCLIP, wrap: Callable[[dict[str, torch.Tensor]], object], tmp_path: Path, caplog: LogCapture
) -> None:
    torch.save(wrap(student.vision_state_dict()), tmp_path / "weights.pt")
    assert torch.equal(features(OpenCLIP(MODEL, pretrained=str(tmp_path / "weights.pt"))), features(student))
    assert not caplog.records


def test_plain_weights_come_before_averaged_ones_and_the_choice_is_told(
    student: OpenCLIP, tmp_path: Path, caplog: LogCapture
) -> None:
    state, path = student.vision_state_dict(), str(tmp_path / "weights.pt")
    other = {name: tensor + 1 for name, tensor in state.items()}
    joined = {**{f"model.{name}": t for name, t in state.items()}, **{f"model_ema.{n}": t for n, t in other.items()}}
    for content in ({"model": state, "model_ema": other}, joined):
        caplog.clear()
        torch.save(content, path)
        assert torch.equal(features(OpenCLIP(MODEL, pretrained=path)), features(student))
        (record,) = caplog.records
        assert all(part in record.getMessage() for part in (path, "model", "model_ema"))
    torch.save({"student": state, "teacher": other}, path)
    with pytest.raises(WeightsError, match="student, teacher"):
        read(path)


def test_a_timm_trunk_of_siglip2(tmp_path: Path) -> None:
    siglip = SigLIP2("ViT-B-32-SigLIP2-256", None)
    state = siglip.vision_state_dict()
    save_file({n.removeprefix("visual.trunk."): t for n, t in state.items()}, tmp_path / "model.safetensors")
    loaded = SigLIP2("ViT-B-32-SigLIP2-256", str(tmp_path / "model.safetensors")).vision_state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_prefix_of_the_model_itself_stays(tmp_path: Path) -> None:
    names = {"model.a.weight": torch.zeros(1), "model.b.weight": torch.zeros(1), "head.weight": torch.zeros(1)}
    path = str(tmp_path / "weights.pt")
    for wrapper in ("", "student.", "module._orig_mod.", "model."):
        torch.save({wrapper + name: tensor for name, tensor in names.items()}, path)
        assert read(path, expected=names).keys() == names.keys()


def test_a_missing_tensor_is_named_with_one_that_is_there(tmp_path: Path) -> None:
    state = OpenCLIP(MODEL, None).vision_state_dict()
    save_file({name.replace("visual.", "visual.tower."): t for name, t in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"class_embedding is missing .*visual\.tower\.class_embedding"):
        OpenCLIP(MODEL, str(tmp_path / "a.safetensors"))


def test_a_folder_as_the_hub_lays_it_out(student: OpenCLIP, tmp_path: Path) -> None:
    save_file(student.vision_state_dict(), tmp_path / "open_clip_model.safetensors")
    assert torch.equal(features(OpenCLIP(MODEL, pretrained=str(tmp_path))), features(student))


def test_the_text_tower_comes_from_the_same_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import open_clip

    torch.manual_seed(2)
    clip = open_clip.create_model(MODEL, require_pretrained=False).eval()
    path = tmp_path / "whole.safetensors"
    save_file(clip.state_dict(), path)
    with torch.no_grad():
        expected = clip.encode_text(open_clip.get_tokenizer(MODEL)(["a cat", "a dog"]))
    caplog.clear()
    torch.testing.assert_close(OpenCLIP(MODEL, pretrained=str(path)).encode_text(["a cat", "a dog"]), expected)
    assert not caplog.records  # open_clip would warn about random weights


def test_what_lies_beside_the_model_is_left_out(student: OpenCLIP, tmp_path: Path) -> None:
    inside = {f"segmentor.net.model.{name}": tensor for name, tensor in student.vision_state_dict().items()}
    beside = {"segmentor.text": torch.ones(2), "loss.scale": torch.ones(1)}
    torch.save({"state_dict": {**inside, **beside}}, tmp_path / "a.ckpt")
    assert torch.equal(features(OpenCLIP(MODEL, pretrained=str(tmp_path / "a.ckpt"))), features(student))


@pytest.mark.slow
def test_text_from_another_file_with_the_activation_of_its_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    torch.manual_seed(3)
    clip = open_clip.create_model("ViT-B-32-quickgelu", require_pretrained=False).eval()
    whole = str(tmp_path / "whole.safetensors")
    save_file(clip.state_dict(), whole)
    save_file(OpenCLIP("ViT-B-32", pretrained=None).vision_state_dict(), tmp_path / "student.safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: whole)
    with torch.no_grad():
        expected = clip.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a cat"]))
    for backbone in (
        OpenCLIP("ViT-B-32", "openai"),
        OpenCLIP("ViT-B-32", str(tmp_path / "student.safetensors"), text_pretrained="openai"),
    ):
        torch.testing.assert_close(backbone.encode_text(["a cat"]), expected)
    assert OpenCLIP("ViT-B-32", "openai").quick_gelu


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "script.pt")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(WeightsError, match="TorchScript"):
        read(path)


def test_a_file_without_text_says_so(student: OpenCLIP, tmp_path: Path) -> None:
    path = tmp_path / "vision.safetensors"
    save_file(student.vision_state_dict(), path)
    with pytest.raises(WeightsError, match=r"ViT-S-32.*text_pretrained"):
        OpenCLIP(MODEL, pretrained=str(path)).encode_text(["a cat"])


def test_a_shape_mismatch_names_the_key(student: OpenCLIP, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    tensors = student.vision_state_dict()
    save_file({**tensors, "visual.proj": torch.zeros(3, 4)}, path)
    with pytest.raises(WeightsError, match=r"proj .*\(3, 4\).*\(384, 384\)"):
        OpenCLIP(MODEL, pretrained=str(path))


def test_nothing_pickled_is_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "harm"),))  # type: ignore[return-value]

    path = tmp_path / "harm.pth"
    torch.save({"state_dict": Harm()}, path)
    with pytest.raises(WeightsError, match="UnpicklingError"):
        read(str(path))
    assert not (tmp_path / "harm").exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightsError, match=r"cannot be read as weights|does not contain named tensors"):
        read(str(tmp_path / "plain.pt"))


def test_missing_files_and_unknown_models_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"/nowhere\.pt"):
        read("/nowhere.pt")
    with pytest.raises(WeightsError, match=r"'laion2b_s34b' .*laion2b_s34b_b88k"):
        OpenCLIP("ViT-B-16", pretrained="laion2b_s34b")
    with pytest.raises(WeightsError, match=r"open_clip_model\.safetensors"):
        OpenCLIP(MODEL, pretrained=str(tmp_path))
    with pytest.raises(ValueError, match=r"'ViT-B-61'.*ViT-B-16"):
        OpenCLIP("ViT-B-61", pretrained=None)
    with pytest.raises(ValueError, match=r"OpenCLIP: .*SigLIP"):
        OpenCLIP("coca_ViT-B-32", pretrained=None)
    with pytest.raises(ValueError, match="SigLIP2: "):
        SigLIP2("ViT-B-16", pretrained=None)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (SigLIP2, ["open_clip_config.json and open_clip_model.safetensors of timm/ViT-B-16-SigLIP2-512"]),
        (lambda: OpenCLIP("ViT-B-16", "dfn2b"), ["open_clip_config.json", "apple/DFN2B-CLIP-ViT-B-16", "folder"]),
    ],
)
def test_offline_the_error_names_the_files(
    make: Callable[[], object], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    def no_network(config: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    with pytest.raises(WeightsError) as error:
        make()
    assert all(part in str(error.value) for part in parts)


def test_offline_a_tag_without_a_repository_names_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    config = {"url": "https://x/ViT-B-16.pt", "quick_gelu": True}

    def no_network(config: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: config)
    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    with pytest.raises(WeightsError, match=r"https://x/ViT-B-16\.pt .*ViT-B-16-quickgelu"):
        OpenCLIP("ViT-B-16", "openai")
