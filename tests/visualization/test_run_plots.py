"""Tests of figures: they are written to files and do not change the user's matplotlib backend."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch

from spar_lightning.visualization.pca import Basis, draw_pca
from spar_lightning.visualization.run_plots import draw_curves, draw_predictions
from spar_lightning.visualization.sweep_figures import draw_areas, draw_strides


def test_curves_leave_out_values_that_are_not_finite(tmp_path: Path) -> None:
    finite = {"loss": {0: 1.0, 2: 0.5}, "mIoU/x": {2: 40.0}}
    draw_curves(finite, tmp_path / "finite.png")
    more = {"loss": {**finite["loss"], 1: math.nan}, "mIoU/x": {2: 40.0, 3: math.inf}, "mIoU/y": {2: math.nan}}
    draw_curves(more, tmp_path / "more.png")
    assert (tmp_path / "more.png").read_bytes() == (tmp_path / "finite.png").read_bytes()


def test_the_backend_stays_the_users(tmp_path: Path) -> None:
    matplotlib.use("svg")
    image = np.zeros((8, 16, 3), np.uint8)
    features = torch.randn(2, 4, 6)
    draw_pca(image, {"teacher": features}, Basis.of(features), tmp_path / "pca.png")
    draw_curves({"loss": {0: 1.0, 1: 0.5}, "mIoU/x": {1: 40.0}}, tmp_path / "curves.png")
    draw_predictions([(image, image[..., 0])], ["image", "labels"], ["cat"], tmp_path / "predictions.png")
    timing = {"ms": 2.0, "quartiles": (1.0, 3.0)}
    point = {"curve": "x", "mean": 40.0, "ms": 2.0, "timings": {"a": timing}, "window": 64}
    draw_strides([{**point, "stride": 16}, {**point, "stride": 8}], "mIoU", "ms", tmp_path / "strides")
    draw_areas([{**point, "area": 64}, {**point, "area": 96}], "mIoU", "ms", tmp_path / "areas")
    assert matplotlib.get_backend() == "svg"
    assert len(list(tmp_path.iterdir())) == 7
