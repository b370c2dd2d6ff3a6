"""Example images of `spar demo`: a folder, the validation images of a run, or synthetic ones."""

from pathlib import Path

import pytest
from PIL import Image

from spar_lightning.cli.demo import _below, _chosen, _of_run
from spar_lightning.datamodules import RenderedScenes
from spar_lightning.errors import UserError


def test_examples_are_images_of_the_run(tmp_path: Path) -> None:
    settings = {"root": str(tmp_path), "train_scenes": 1, "val_scenes": 20, "val_sizes": [32, 48], "cached": False}
    RenderedScenes(**settings).draw()  # type: ignore[arg-type]
    run = {"data": {"class_path": "spar_lightning.datamodules.RenderedScenes", "init_args": settings}}
    images = _of_run(run)
    assert len(images) == 20 and images[0].parent.parent.name == "scenes_48"
    shown = _chosen(images, tmp_path)
    assert len(shown) == 8 and [path.parent for path in shown] == [tmp_path] * 8
    assert {Image.open(path).size for path in shown} == {(48, 48)}
    settings["root"] = str(tmp_path / "moved")
    assert _of_run(run) == [] == _of_run({"model": {}}) == _of_run({"data": {"class_path": "mine.Data"}})


def test_examples_of_a_folder(tmp_path: Path) -> None:
    assert _below(None) == []
    with pytest.raises(UserError, match="contains no images"):
        _below(str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert _below(str(tmp_path)) == [tmp_path / "a.png"]
