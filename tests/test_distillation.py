"""Tests of teacher and student: trainable parameters, content of checkpoints, resume."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from spar_lightning.backbones import Tiny
from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.backbones.parameter_groups import SelectorError
from spar_lightning.backbones.weights import WeightsError
from spar_lightning.datamodules.samplers import ResumeError
from spar_lightning.datasets.samples import Sample
from spar_lightning.distillation import Distillation, DivergenceError
from spar_lightning.errors import UserError
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.sliding_window import SlidingWindow
from tests.rounding import assert_rounded


def sample(height: int = 96, width: int = 80, features: torch.Tensor | None = None) -> Sample:
    generator = torch.Generator().manual_seed(height)
    return Sample("sa_1", torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator), features)


def module(**kwargs: Any) -> Distillation:
    distillation = Distillation(Tiny(), stride=16, **kwargs)
    distillation.log = lambda *_, **__: None  # type: ignore[method-assign]  # no Trainer here
    return distillation


def change(distillation: Distillation) -> None:
    """Take a large step."""
    with torch.no_grad():
        for parameter in distillation.student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def test_defaults_are_the_papers() -> None:
    distillation = Distillation(Tiny(pretrained=None))
    optimizer = distillation.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW) and isinstance(distillation.loss, nn.MSELoss)
    assert distillation.config.stride == 24
    assert optimizer.defaults["lr"] == 2e-5 and optimizer.defaults["weight_decay"] == 1e-4
    trained = {name.split(".")[2] for name, p in distillation.named_parameters() if p.requires_grad}
    assert trained == {"4", "5"}


def test_only_the_student_is_in_the_state_dict_and_teacher_stays_as_it_was() -> None:
    distillation = module()
    names = set(distillation.state_dict())
    before = distillation.teacher_identity()["weights"]
    change(distillation)
    distillation.training_step([sample()], 0)  # runs the teacher
    assert set(distillation.state_dict()) == names == {f"student.{name}" for name in Tiny().state_dict()}
    assert distillation.teacher_identity()["weights"] == before == Tiny().weights_digest()
    assert distillation.student.weights_digest() != before
    assert not any(p.requires_grad for p in distillation.build_teacher().parameters())


def test_loss_is_the_distance_to_the_sliding_window() -> None:
    distillation = module()
    pixels = distillation.student.normalize(sample().image[None])
    with torch.no_grad():
        target, student = SlidingWindow(Tiny(), 16)(pixels), Tiny()(pixels)
    expected = (target - student).square().mean()
    torch.testing.assert_close(distillation.training_step([sample()], 0), expected)
    cached = distillation.training_step([sample(features=target[0].half())], 0)
    torch.testing.assert_close(cached, expected, rtol=1e-3, atol=0)


def test_a_batch_is_the_mean_over_images() -> None:
    distillation = module()
    batch = [sample(96, 80), sample(64, 128), sample(72, 72)]
    singles = torch.stack([distillation.training_step([one], 0) for one in batch])
    torch.testing.assert_close(distillation.training_step(batch, 0), singles.mean())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_images(value: float) -> None:
    distillation = module()
    logged: list[str] = []
    distillation.log = lambda name, *_, **__: logged.append(name)  # type: ignore[method-assign]
    distillation.batch_loss = lambda batch: torch.tensor(value)  # type: ignore[method-assign]
    batch = [sample()._replace(key=f"sa_{i}") for i in range(4)]
    with pytest.raises(DivergenceError, match=rf"{value} \(images: sa_0, sa_1, sa_2, \.\.\.\).* step 0.*model\.lr"):
        distillation.training_step(batch, 0)
    assert not logged


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_saved(value: float) -> None:
    distillation = module()
    optimizer = distillation.configure_optimizers()
    with torch.no_grad():
        distillation.student.get_parameter("blocks.5.mlp.fc1.bias")[3] = value
    with pytest.raises(DivergenceError, match=r"^1 of \d+ .*blocks\.5\.mlp\.fc1\.bias.*model\.lr"):
        checkpoint(distillation, optimizer)


def test_a_step_that_the_gradient_scaler_skips_is_no_divergence() -> None:
    distillation = module()
    optimizer = distillation.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)  # too high at first, as with 16-mixed
    scaler.scale(100 * distillation.training_step([sample()], 0)).backward()
    assert not all(p.grad.isfinite().all() for p in distillation.parameters() if p.grad is not None)
    scaler.step(optimizer)
    assert checkpoint(distillation, optimizer)["spar"]
    assert distillation.training_step([sample()], 0).isfinite()


def test_gradient_reaches_the_trainable_parameters_and_no_other() -> None:
    distillation = module()
    distillation.training_step([sample()], 0).backward()
    for name, parameter in distillation.student.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("blocks.4.", "blocks.5.")), name


def test_a_selector_without_match() -> None:
    with pytest.raises(SelectorError, match=r"blocks\.9"):
        module(trainable=["blocks.9"])


def checkpoint(distillation: Distillation, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    saved: dict[str, Any] = {
        "state_dict": distillation.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
    }
    distillation.on_save_checkpoint(saved)
    return saved


def test_a_resume_takes_the_users_rates_not_the_saved_ones() -> None:
    old = module(lr=1e-3, weight_decay=0.1)
    saved = checkpoint(old, old.configure_optimizers())
    module(lr=5e-4, weight_decay=0.2).on_load_checkpoint(saved)
    group = saved["optimizer_states"][0]["param_groups"][0]
    assert group["lr"] == pytest.approx(5e-4) and group["weight_decay"] == 0.2


def test_a_resume_keeps_the_place_in_the_schedule() -> None:
    def scheduled(lr: float) -> Distillation:
        def halve(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.StepLR:
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

        made = module(lr=lr, lr_schedule=halve)
        made._total_steps = lambda: 10  # type: ignore[method-assign]  # no Trainer here
        return made

    old = scheduled(1e-3)
    configured = old.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    optimizer.step()
    schedule.step()
    saved = checkpoint(old, optimizer)
    saved["lr_schedulers"] = [schedule.state_dict()]
    scheduled(4e-3).on_load_checkpoint(saved)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(2e-3)
    assert saved["lr_schedulers"][0]["base_lrs"] == [pytest.approx(4e-3)]


def test_a_checkpoint_of_another_selection_is_refused() -> None:
    old = module(trainable=["blocks.-1"])
    saved = checkpoint(old, old.configure_optimizers())
    with pytest.raises(ResumeError, match=r"'blocks\.-1'.*model\.trainable"):
        module().on_load_checkpoint(saved)


def test_an_unknown_setting_of_inference() -> None:
    with pytest.raises(UserError, match=r"refine .* 'lposs'"):
        module(refine="lposs")
    with pytest.raises(TypeError, match="strid"):
        module(strid=3)


def test_the_upsampler_is_read_before_the_features_are_made(tmp_path: Path) -> None:
    (tmp_path / "anyup.pth").write_text("no weights")
    distillation = module(upsampler=str(tmp_path / "anyup.pth"))
    with pytest.raises(WeightsError, match=r"anyup\.pth"):
        distillation.prepare_data()


def test_a_checkpoint_with_another_attention_is_rejected() -> None:
    windowed = module(attention="windowed")
    saved = checkpoint(windowed, torch.optim.AdamW(windowed.student.parameters()))
    windowed.on_load_checkpoint(saved)
    with pytest.raises(ResumeError, match=r"another model\.attention: windowed .*'keys': 8"):
        module().on_load_checkpoint(saved)


def test_a_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(ResumeError, match="'spar'"):
        module().on_load_checkpoint({"state_dict": {}})


def test_no_hyperparameters_are_saved() -> None:
    distillation = module()
    saved = checkpoint(distillation, distillation.configure_optimizers())
    assert not distillation.hparams and "hyper_parameters" not in saved


def test_a_checkpoint_of_another_backbone_names_the_tensor() -> None:
    old = module()
    saved = checkpoint(old, old.configure_optimizers())
    saved["state_dict"] = {**old.state_dict(), "student.head.bias": torch.zeros(7)}
    with pytest.raises(ResumeError, match=r"student\.head\.bias .*\(7,\).*\(128,\)"):
        module().on_load_checkpoint(saved)


@pytest.mark.parametrize("lr", [0.0, -1.0])
def test_a_rate_that_is_no_rate(lr: float) -> None:
    with pytest.raises(UserError, match=r"lr .*weight_decay"):
        module(lr=lr)


def test_processes_with_packs_of_different_length_give_the_gradient_of_all_images() -> None:
    features = {size: torch.randn(size // 8, 10, 128) for size in (64, 72, 80, 96)}
    samples = [sample(size, 80, features[size]) for size in features]

    def gradients(parts: list[list[Sample]]) -> list[torch.Tensor]:
        """Return the gradients averaged over ranks, as DDP does."""
        distillation = module(trainable=("blocks.-1",))
        mean = torch.tensor(sum(map(len, parts)) / len(parts))
        strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: mean)
        distillation._trainer = SimpleNamespace(world_size=len(parts), strategy=strategy, global_step=0)  # type: ignore[assignment]
        for part in parts:
            (distillation.training_step(part, 0) / len(parts)).backward()
        return [p.grad for p in distillation.student.parameters() if p.grad is not None]

    for one, two in zip(gradients([samples]), gradients([samples[:3], samples[3:]]), strict=True):
        assert_rounded(two, one, 12, 128 * 4 * 120)  # 6 blocks forward and backward; sums over the tokens of 4 images


def test_a_compiled_network_takes_any_size_without_compiling_again() -> None:
    counter = CompileCounter()
    tiny, plain = Tiny(), Tiny()
    tiny.compile(dynamic=True, backend=counter)
    with torch.no_grad():
        for height, width in ((64, 64), (72, 96), (128, 80), (40, 200), (104, 104), (80, 336)):
            images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))
            assert_rounded(tiny(images), plain(images), tiny.depth, tiny.embed_dim)
    assert counter.frame_count <= 2  # square images, and all other sizes


def test_the_weights_of_windows_change_the_teacher() -> None:
    mean, hann = module(), module(blend="hann")
    assert mean.teacher_identity() != hann.teacher_identity()
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(hann.build_teacher()(image), SlidingWindow(Tiny(), 16, blend="hann")(image))
        assert not torch.equal(hann.build_teacher()(image), mean.build_teacher()(image))


def test_windowed_attention_changes_the_student_and_not_the_teacher() -> None:
    full, windowed = module(), module(attention="windowed")
    assert windowed.teacher_identity() == full.teacher_identity()
    assert windowed.teacher_backbone().windowed is None and windowed.student.windowed == WindowedAttention()
    assert windowed.batch_loss([sample()]) != full.batch_loss([sample()])
    before = Segmenter(windowed.teacher_backbone(), ["red dot"], windowed.config)
    assert before.backbone.windowed == WindowedAttention()  # the single pass before training has the same attention


@pytest.mark.slow
def test_compiled_windowed_attention_equals_eager() -> None:
    """It may compile again for larger images, so every size is within the limit of torch."""
    eager = Tiny().with_attention(WindowedAttention())
    compiled = Tiny().with_attention(WindowedAttention())
    compiled.compile(dynamic=True)
    with torch.no_grad():
        for height, width in ((192, 256), (64, 64), (72, 96), (320, 128)):
            images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))
            assert_rounded(compiled(images), eager(images), eager.depth, eager.embed_dim)


def test_teacher_and_student_are_compiled_when_that_is_asked_for() -> None:
    def compiled(network: Any) -> object:
        return network._compiled_call_impl

    distillation = module(compile=True)
    teacher = distillation.build_teacher().backbone
    assert compiled(distillation.student) and compiled(teacher)
    assert compiled(distillation.student) is not compiled(teacher)
    assert set(distillation.state_dict()) == set(module().state_dict())
    assert compiled(module().build_teacher().backbone) is None
