"""Tests of the losses: closed forms, invariances, gradients, the sampled Gram loss, and training with each of them."""

import math
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spar_lightning.backbones import Tiny
from spar_lightning.datasets.samples import Sample
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark_config import BenchmarkError
from spar_lightning.losses import (
    ClassSimilarityLoss,
    CosineLoss,
    GramLoss,
    MSECosineLoss,
    gram_difference,
    warn_if_tiny,
)
from spar_lightning.segmentation.text_embeddings import TextClassifiers

ALONE: dict[str, Any] = {"base": None}
LOSSES = [CosineLoss(), MSECosineLoss(), MSECosineLoss(0.5), GramLoss(), GramLoss(2, rows=3), GramLoss(**ALONE)]


def features(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape or (3, 4, 8), dtype=dtype, generator=torch.Generator().manual_seed(seed))


def image(*patches: list[float]) -> Tensor:
    """Return the features of an image with one row of patches."""
    return torch.tensor([patches], dtype=torch.float32)


ONE = image([1, 0], [0, 2])


@pytest.mark.parametrize(
    ("student", "cosine", "mse"),
    [
        (ONE, 0, 0),
        (3 * ONE, 0, (4 + 16) / 4),
        (image([0, 1], [5, 0]), 1, (1 + 1 + 25 + 4) / 4),  # orthogonal
        (-ONE, 2, (4 + 16) / 4),
        (image([1, 0], [-2, 2]), (1 - math.sqrt(0.5)) / 2, 4 / 4),  # mean over patches
        (image([1, 0], [0, 0]), 0.5, 4 / 4),
    ],
)
def test_cosine_by_hand(student: Tensor, cosine: float, mse: float) -> None:
    assert CosineLoss()(student, ONE).item() == pytest.approx(cosine, abs=1e-6)
    assert MSECosineLoss()(student, ONE).item() == pytest.approx(mse + cosine, abs=1e-6)
    assert MSECosineLoss(0.25)(student, ONE).item() == pytest.approx(mse + 0.25 * cosine, abs=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (ONE, ONE, 0),
        (image([1, 0], [3, 0]), ONE, 2 / 4),  # similarity 1 instead of 0, in two of four pairs
        (image([1, 0], [-3, 0]), image([1, 1], [2, 2]), 8 / 4),  # -1 instead of 1
        (image([1, 0], [0, 1], [1, 1]), image([1, 0], [1, 0], [0, 1]), 2 * (1 + 0.5 + 0.5) / 9),
        (image([0, 0], [0, 1]), image([1, 0], [0, 1]), 1 / 4),  # the pair of a zero vector with itself is 0
    ],
)
def test_gram_by_hand(student: Tensor, teacher: Tensor, expected: float) -> None:
    assert GramLoss(**ALONE)(student, teacher).item() == pytest.approx(expected, abs=1e-6)
    mse = nn.MSELoss()(student, teacher).item()
    assert GramLoss()(student, teacher).item() == pytest.approx(mse + expected, abs=1e-6)
    assert GramLoss(2, base=CosineLoss())(student, teacher).item() == pytest.approx(
        CosineLoss()(student, teacher).item() + 2 * expected, abs=1e-6
    )


def test_gram_is_the_formula_of_dinov3() -> None:
    student, teacher = features(0), features(1)
    s, t = (nn.functional.normalize(x.flatten(0, 1), dim=-1) for x in (student, teacher))
    torch.testing.assert_close(GramLoss(**ALONE)(student, teacher), nn.functional.mse_loss(s @ s.T, t @ t.T))


def test_invariances() -> None:
    student, teacher = features(0), features(1)
    lengths = features(2, 3, 4, 1).exp()
    rotation = torch.linalg.qr(features(3, 8, 8)).Q
    for loss in (CosineLoss(), GramLoss(**ALONE)):
        torch.testing.assert_close(loss(student * lengths, teacher), loss(student, teacher))
    gram, cosine = GramLoss(**ALONE), CosineLoss()
    torch.testing.assert_close(gram(student @ rotation, teacher), gram(student, teacher))
    assert gram(teacher @ rotation, teacher) < 1e-10 and cosine(teacher @ rotation, teacher) > 0.1


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradients(loss: nn.Module) -> None:
    student, teacher = features(0, dtype=torch.float64).requires_grad_(), features(1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


@pytest.mark.parametrize("loss", [CosineLoss(), GramLoss(**ALONE)], ids=str)
def test_zero_vectors_have_no_gradient(loss: nn.Module) -> None:
    student, teacher = features(0), features(1)
    student[0, :2], teacher[0, 1:3] = 0, 0
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert student.grad is not None and value.isfinite() and student.grad.isfinite().all()
    assert (student.grad[0, :2] == 0).all() and (student.grad[1:] != 0).all()


def test_the_mean_over_all_samples_is_the_loss_with_all_rows() -> None:
    student, teacher = (features(seed, 2, 3, 8, dtype=torch.float64) for seed in (0, 1))
    for rows in (1, 2, 5):
        samples = [gram_difference(student, teacher, torch.tensor(chosen)) for chosen in combinations(range(6), rows)]
        torch.testing.assert_close(torch.stack(samples).mean(), GramLoss(rows=None, **ALONE)(student, teacher))


def test_the_sampled_loss_is_unbiased() -> None:
    student, teacher = features(0), features(1)
    student[0] = teacher[0] = 1  # rows with very different losses
    # The scale of the teacher does not change the loss, but the rows.
    draws = torch.stack([GramLoss(rows=3, **ALONE)(student, teacher * (1 + i / 1000)) for i in range(1000)])
    error = draws.std() / len(draws) ** 0.5
    full = GramLoss(rows=None, **ALONE)(student, teacher)
    assert abs(draws.mean() - full) < 4 * error and error < 0.02 * full


@pytest.mark.parametrize("rows", [12, 13, None])
def test_all_rows(rows: int | None) -> None:
    student, teacher = features(0), features(1)
    torch.testing.assert_close(GramLoss(rows=rows, **ALONE)(student, teacher), GramLoss(**ALONE)(student, teacher))


def test_rows_depend_only_on_the_teacher() -> None:
    student, teacher, loss = features(0), features(1), GramLoss(rows=3, **ALONE)
    first = loss(student, teacher)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    copy = torch.empty(3, 8, 4).transpose(1, 2).copy_(teacher)  # the same values in another memory layout
    assert loss(student, copy) == first
    torch.set_rng_state(state)
    assert loss(student, teacher) == first and torch.equal(torch.get_rng_state(), state)
    assert loss(student, teacher.nextafter(torch.tensor(2.0))) != pytest.approx(first.item(), rel=1e-3)


class Largest(TorchFunctionMode):
    """Record the number of values of the largest tensor that a function returns."""

    values = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor):
            self.values = max(self.values, result.nelement())
        return result


def test_memory_is_rows_times_patches() -> None:
    student, teacher = features(0, 10, 20, 4), features(1, 10, 20, 4)
    with Largest() as largest:
        GramLoss(rows=5, **ALONE)(student, teacher)
    assert largest.values == 5 * 200


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_autocast_does_not_change_the_loss(loss: nn.Module) -> None:
    student, teacher = features(0), features(1)
    expected = loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher), expected)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_weights_must_be_positive(value: float) -> None:
    with pytest.raises(UserError, match=rf"\bweight\b.*{value}"):
        GramLoss(value)
    with pytest.raises(UserError, match=rf"cosine_weight\b.*{value}"):
        MSECosineLoss(value)


@pytest.mark.parametrize("rows", [0, -3])
def test_rows_must_be_positive(rows: int) -> None:
    with pytest.raises(UserError, match=rf"\brows\b.*{rows}"):
        GramLoss(rows=rows)


@pytest.fixture
def classes(tmp_path: Path) -> str:
    """Return a YAML file with three names of two classes."""
    path = tmp_path / "classes.yaml"
    path.write_text("classes: [{label: round, names: [red dot, blue dot]}, {label: wavy, names: [waves]}]\n")
    return str(path)


def test_class_similarity_is_the_formula(classes: str) -> None:
    tiny = Tiny()
    loss = ClassSimilarityLoss(classes)
    loss.encode(TextClassifiers(tiny, ["{}"]))
    names = nn.functional.normalize(tiny.encode_text(["red dot", "blue dot", "waves"]), dim=-1)
    student, teacher = features(0, 3, 4, 128), features(1, 3, 4, 128)
    sums = torch.zeros(())
    for row, column, name in product(range(3), range(4), range(3)):
        s, t = (torch.cosine_similarity(x[row, column], names[name], dim=0) for x in (student, teacher))
        sums += (s - t) ** 2
    torch.testing.assert_close(loss(student, teacher), sums / 36)
    torch.testing.assert_close(loss(5 * student, teacher), loss(student, teacher))  # lengths do not matter
    beside = student - student @ torch.linalg.pinv(names) @ names  # orthogonal to every name
    assert loss(torch.randn(()) * beside, beside) < 1e-12
    assert loss(torch.zeros_like(student), teacher).isfinite()


@pytest.mark.parametrize(("name", "count"), [("ade20k", 150), ("cityscapes", 19)])
def test_class_names_of_bundled_benchmarks(name: str, count: int) -> None:
    assert len(ClassSimilarityLoss(name).classes) == count


def test_class_names_that_do_not_exist() -> None:
    with pytest.raises(BenchmarkError, match=r"'ade20' not found.*ade20k.*the path of a YAML file"):
        ClassSimilarityLoss("ade20")


def configured(*arguments: str) -> nn.Module:
    """Return the loss of a configuration."""
    parser = ArgumentParser()
    parser.add_argument("--model.loss", type=nn.Module)
    loss = parser.instantiate_classes(parser.parse_args(list(arguments))).model.loss
    assert isinstance(loss, nn.Module)
    return loss


OWN = "spar_lightning.losses"
GRAM = f"{{class_path: {OWN}.GramLoss, init_args: {{weight: 2, rows: 5, base: {{class_path: {OWN}.MSECosineLoss}}}}}}"

NAMES = f"{{class_path: {OWN}.ClassSimilarityLoss, init_args: {{classes: CLASSES}}}}"
NESTED = f"{{class_path: {OWN}.GramLoss, init_args: {{base: {NAMES}}}}}"


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["--model.loss", "MSELoss"], nn.MSELoss),
        (["--model.loss", f"{OWN}.CosineLoss"], CosineLoss),
        (["--model.loss", f"{OWN}.MSECosineLoss", "--model.loss.cosine_weight", "0.5"], MSECosineLoss),
        (["--model.loss", GRAM], GramLoss),
        (["--model.loss", f"{OWN}.GramLoss", "--model.loss.base", "null"], GramLoss),
        (["--model.loss", f"{OWN}.ClassSimilarityLoss", "--model.loss.classes", "CLASSES"], ClassSimilarityLoss),
        (["--model.loss", NESTED], GramLoss),
    ],
)
def test_each_loss_trains(arguments: list[str], kind: type[nn.Module], classes: str) -> None:
    loss = configured(*(argument.replace("CLASSES", classes) for argument in arguments))
    assert type(loss) is kind
    module = Distillation(Tiny(), loss=loss, lr=5e-6, stride=32)
    optimizer = module.configure_optimizers()
    pixels = torch.randint(0, 256, (3, 96, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = []
    for _ in range(3):
        values.append(module.batch_loss([Sample("sa_1", pixels, None)]))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[0] > values[1] > values[2] > 0


def test_tiny_features_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    features = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    warn_if_tiny([features, 1e-6 * features])
    assert not caplog.records
    warn_if_tiny([1e-6 * features, (1e-6 * features).half()])
    assert "standard deviation of" in caplog.text and "Check the weights" in caplog.text
