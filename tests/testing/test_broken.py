"""Each way in which plugins were wrong fails a check that names the cause and a line of the author's code."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spar_lightning.backbones import Backbone, DINOv3Text, Tiny
from spar_lightning.backbones.base import Grid, TextTower
from spar_lightning.backbones.packing import patch_tokens
from spar_lightning.errors import UserError
from spar_lightning.image.resize import check_sides
from spar_lightning.testing import Check, backbone_checks


def failures(factory: Callable[[], Backbone]) -> dict[str, tuple[str, str | None]]:
    """Return message and place of each check that fails, by name; without the one that starts a process."""
    found = {}
    for check in backbone_checks(factory):
        if check.name != "import_is_fast" and (error := failure(check)):
            found[check.name] = (str(error), check.place(error))
    return found


def failure(check: Check) -> Exception | None:
    try:
        check()
    except Exception as error:
        return error
    return None


class Table(Tiny):
    """Tiny with its own handling of the positional embedding."""

    def embed(self, images: Tensor) -> Tensor:
        check_sides(images, self.patch_size)
        tokens: Tensor = self.patch_embed(images).permute(0, 2, 3, 1)  # (B, h, w, D)
        table = self.table(self.pos_embed[0].unflatten(0, (8, 8)), tokens.shape[1], tokens.shape[2])
        return (tokens + table).flatten(1, 2)

    def table(self, table: Tensor, h: int, w: int) -> Tensor:
        return nn.functional.interpolate(table.permute(2, 0, 1)[None], (h, w), mode="bicubic")[0].permute(1, 2, 0)


class Cut(Table):
    def table(self, table: Tensor, h: int, w: int) -> Tensor:
        return table.tile(4, 4, 1)[:h, :w]


class Exchanged(Table):
    def table(self, table: Tensor, h: int, w: int) -> Tensor:
        return super().table(table, w, h).reshape(h, w, -1)


class NoPositions(Table):
    def table(self, table: Tensor, h: int, w: int) -> Tensor:
        return 0 * table[:1, :1].expand(h, w, -1)


class Registers(Tiny):
    """Tiny with a class token and four registers."""

    prefix = 5

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0)))

    def embed(self, images: Tensor) -> Tensor:
        return torch.cat([self.registers.expand(len(images), -1, -1), super().embed(images)], dim=1)

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        return super().project(self.patches(tokens, grids), grids)

    def patches(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        return patch_tokens(tokens, grids, 5)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {**super().parameter_groups(), "prefix": [self.registers]}

    def load_vision_state_dict(self, state_dict: Any) -> None:
        if "registers" in self._parameters:
            self.load_state_dict(state_dict)
        else:
            super().load_vision_state_dict(state_dict)


class DropsLast(Registers):
    def patches(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        parts = tokens.split([5 + h * w for h, w in grids], dim=1)
        return torch.cat([part[:, :-5] for part in parts], dim=1)


class WrongPrefix(Registers):
    prefix = 4


class WrongWidth(Tiny):
    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        return super().project(tokens[..., :64], grids)


class ColumnMajor(Tiny):
    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        parts = super().project(tokens, grids).split([h * w for h, w in grids], dim=1)
        turned = [
            part.unflatten(1, grid).transpose(1, 2).flatten(1, 2) for part, grid in zip(parts, grids, strict=True)
        ]
        return torch.cat(turned, dim=1)


class Bytes(Tiny):
    mean = (123.7, 116.3, 103.5)
    std = (58.4, 57.1, 57.4)


class SmallWindow(Tiny):
    """The table has 8 x 8 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.window = 32


class InPlace(Tiny):
    def embed(self, images: Tensor) -> Tensor:
        return super().embed(images.mul_(1.5))


class OtherGroups(Tiny):
    """Tiny whose groups are changed by `change`."""

    change: Callable[[dict[str, list[nn.Parameter]]], Any]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = super().parameter_groups()
        type(self).change(groups)
        return groups


class NoHead(OtherGroups):
    @staticmethod
    def change(groups: dict[str, list[nn.Parameter]]) -> Any:
        del groups["head"]


class NoBlock(OtherGroups):
    @staticmethod
    def change(groups: dict[str, list[nn.Parameter]]) -> Any:
        for name in [name for name in groups if name.startswith("blocks.5")]:
            del groups[name]


class FromOne(OtherGroups):
    @staticmethod
    def change(groups: dict[str, list[nn.Parameter]]) -> Any:
        for name in [name for name in groups if name.startswith("blocks.")]:
            _, number, *rest = name.split(".")
            groups[".".join(["blocks", f"{int(number) + 10}", *rest])] = groups.pop(name)


class Twice(OtherGroups):
    @staticmethod
    def change(groups: dict[str, list[nn.Parameter]]) -> Any:
        groups["norm"] = [*groups["norm"], groups["head"][0]]


@pytest.mark.parametrize(
    ("broken", "check", "text", "method"),
    [
        (Cut, "positions_are_resized", "repeated or cut instead of resized", "embed"),
        (Exchanged, "positions_are_resized", "height and width are exchanged", "embed"),
        (NoPositions, "positions_are_resized", "the same for all patches", "embed"),
        (NoPositions, "positions_affect_the_features", "positions are missing", "embed"),
        (DropsLast, "project_keeps_the_order", "becomes feature", "project"),
        (WrongPrefix, "attributes_are_consistent", "prefix is 4, expected 5", "__init__"),
        (
            ColumnMajor,
            "project_keeps_the_order",
            "patch token 1 (after 0 class and register tokens) becomes",
            "project",
        ),
        (WrongWidth, "shapes_square_wide_tall", "normalized_shape", "project"),
        (Bytes, "attributes_are_consistent", "pixels are in [0, 1]", "__init__"),
        (SmallWindow, "table_fits_the_window", "64 rows, expected 4 x 4", "__init__"),
        (InPlace, "inputs_stay_unchanged", "embed changes its input", "embed"),
        (NoHead, "groups_are_complete", "head.weight affects dense features, but is in no group", "parameter_groups"),
        (NoBlock, "groups_are_complete", "blocks.5", "parameter_groups"),
        (FromOne, "groups_are_complete", "expected blocks.0, blocks.1", "parameter_groups"),
        (Twice, "groups_are_complete", "head.weight is in the groups norm and head", "parameter_groups"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_broken_backbone_fails(broken: type[Backbone], check: str, text: str, method: str) -> None:
    built = broken()
    found = failures(lambda: copy.deepcopy(built))
    message, place = found[check]
    assert text in message
    owners = [cls.__dict__[method] for cls in broken.__mro__ if cls.__module__ == __name__ and method in cls.__dict__]
    lines, start = inspect.getsourcelines((owners or [broken])[0])
    assert place is not None
    file, _, line = place.rpartition(":")
    assert file == __file__ and start <= int(line) < start + len(lines)


@pytest.mark.parametrize("right", [Table, Registers])
def test_the_same_without_a_fault(right: type[Backbone]) -> None:
    built = right()
    assert failures(lambda: copy.deepcopy(built)).keys() <= {"found_by_short_name"}


@pytest.mark.parametrize(
    ("embeddings", "text"),
    [
        (lambda prompts: torch.randn(len(prompts), 128), "different embeddings for the same prompts"),
        (lambda prompts: torch.ones(len(prompts), 768), "shape (2, 768) for 2 prompts, expected"),
        (lambda prompts: torch.ones(len(prompts), 128), "equal embeddings"),
        (lambda prompts: torch.ones(len(prompts), 128, dtype=torch.long), "torch.int64"),
        (lambda prompts: torch.full((len(prompts), 128), torch.nan), "NaN"),
        (lambda prompts: np.ones((len(prompts), 128)), "returned ndarray"),
        (lambda prompts: None, "returned NoneType"),
    ],
    ids=["random", "wide", "equal", "integers", "nan", "numpy", "none"],
)
def test_text_towers(embeddings: TextTower, text: str) -> None:
    class Words(Tiny):
        def build_text_tower(self) -> TextTower:
            return embeddings

    if "returned" in text or "shape" in text or "int64" in text:
        with pytest.raises(UserError, match=r"Words: the text encoder returned .* Correct build_text_tower"):
            Words().encode_text(["red", "blue"])
    checks = {check.name: check for check in backbone_checks(Words)}
    error = failure(checks["text_embeddings_are_valid"])
    assert text in str(error)
    place = checks["text_embeddings_are_valid"].place(error or ValueError())
    assert place is not None and place.startswith(f"{__file__}:")


class SmallRope(DINOv3Text):
    """DINOv3.txt with layer scales that are not tiny, so that attention matters."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__("vit_tiny_patch16_dinov3_qkvb", window=64)
        for block in self.trunk.blocks:
            block.gamma_1.data.fill_(1.0)


class RopeExchanged(SmallRope):
    def rotation(self, grid: Grid) -> Tensor:
        rope = super().rotation((grid[1], grid[0]))
        turned = rope[5:].unflatten(0, (grid[1], grid[0])).transpose(0, 1).flatten(0, 1)
        return torch.cat([rope[:5], turned])


class RopeCut(SmallRope):
    def rotation(self, grid: Grid) -> Tensor:
        native = super().rotation((4, 4))
        patches = native[5:].unflatten(0, (4, 4)).tile(3, 3, 1)[: grid[0], : grid[1]].flatten(0, 1)
        return torch.cat([native[:5], patches])


class RopeMissing(SmallRope):
    def rotation(self, grid: Grid) -> Tensor:
        rope = super().rotation(grid)
        return torch.cat([torch.zeros_like(rope[:, :64]), torch.ones_like(rope[:, :64])], dim=1)


class OtherMean(SmallRope):
    mean = (0.48145466, 0.4578275, 0.40821073)


def original(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the features of the original network with its own preprocessing."""
    network = SmallRope()
    network.load_vision_state_dict(backbone.vision_state_dict())
    features: Tensor = network(network.normalize(images))
    return features


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (SmallRope, None),
        (RopeExchanged, "4 x 4 patches"),
        (RopeCut, "6 x 3 patches and those of the reference (check positions"),
        (RopeMissing, "4 x 4 patches"),
        (OtherMean, "4 x 4 patches and those of the reference (check blocks, projection, or mean and std)"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_reference(network: type[Backbone], text: str | None) -> None:
    (check,) = [check for check in backbone_checks(network, original) if check.name == "equals_its_reference"]
    error = failure(check)
    assert error is None if text is None else text in str(error)
