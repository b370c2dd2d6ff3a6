"""Tests of report.html: its pictures and text, and use by keyboard, without errors, in headless Chromium."""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from torch import Tensor

from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.bootstrap import Counts, iou, mean_iou
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.gallery import choose, pictures
from spar_lightning.evaluation.html_report import evaluation_page
from spar_lightning.visualization.palette import palette
from tests import fake_benchmarks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CLASSES = ["cat", "dog", "<b>hen</b>"]


def counts(hits: list[int]) -> Counts:
    """Return counts of images with ten pixels of class 0, of which some are predicted as class 1."""
    return np.array([[[n, 10, n], [0, 0, 10 - n], [0, 0, 0]] for n in hits], float)


def test_choice_of_images() -> None:
    one, other = counts([5, 9, 1, 7, 3, 10, 0, 2]), counts([9, 5, 7, 1, 2, 0, 10, 3])
    assert mean_iou(iou(one))[[0, 5, 6]].tolist() == [25, 100, 0]  # the mean of two classes, of one, and of two
    groups = choose(one, 2, seed=1)
    assert groups["random"] == choose(other, 2, seed=1)["random"] != choose(one, 2, seed=2)["random"]
    left = [index for index in (5, 1, 3, 0, 4, 7, 2, 6) if index not in groups["random"]]  # the best first
    assert groups["best"] == left[:2] and groups["worst"] == left[:-3:-1]
    empty = np.zeros((1, 3, 3))  # no pixel is counted
    assert choose(np.concatenate([empty, one[:1]]), 2, 0) == {"best": [], "worst": [], "random": [1]}
    assert sorted(i for group in choose(one[:3], 4, 0).values() for i in group) == [0, 1, 2]


def opened(folder: Path) -> Benchmark:
    """Return a benchmark with three images of 24 x 40 pixels."""
    for i in range(3):
        fake_benchmarks.jpg(folder / "images" / f"a & b {i}.jpg", fake_benchmarks.image(i, 24, 40))
        fake_benchmarks.grey_png(
            folder / "labels" / f"a & b {i}.png", fake_benchmarks.labels(i, 24, 40, [0, 1, 2, 255])
        )
    classes = [{"label": label, "names": [label]} for label in CLASSES]
    (folder / "benchmark.yaml").write_text(yaml.safe_dump({"classes": classes}))
    benchmark = Benchmark(str(folder))
    benchmark.open()
    return benchmark


def upper_half(pixels: Tensor) -> Tensor:
    """Segment the upper half as class 1 and the lower half as class 0."""
    labels = torch.zeros(pixels.shape[-2:], dtype=torch.long)
    labels[: len(labels) // 2] = 1
    return labels


def decoded(uri: str) -> np.ndarray[Any, Any]:
    kind, _, content = uri.partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return np.array(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def drawn(benchmark: Benchmark) -> list[dict[str, Any]]:
    matrix = ConfusionMatrix(3)
    for i in range(3):
        matrix.update(upper_half(benchmark[i].image), benchmark[i].labels, i)
    found = np.stack([np.zeros((3, 3))] * 3)
    for image, label, *numbers in torch.cat(matrix.per_image)[:, :5].tolist():
        found[image, label] = numbers
    return pictures(benchmark, upper_half, found, choose(found, 1, 0), torch.device("cpu"), nullcontext)


def test_pictures(tmp_path: Path) -> None:
    benchmark = opened(tmp_path)
    images = drawn(benchmark)
    assert sorted(image["group"] for image in images) == ["best", "random", "worst"]
    for image in images:
        original = benchmark[int(image["stem"][-1])]
        labels, predicted = original.labels.numpy(), upper_half(original.image).numpy()
        shown = {kind: decoded(uri) for kind, uri in image["pictures"].items()}
        colours = palette(3)
        assert np.array_equal(shown["labels"], colours[labels]) and np.array_equal(
            shown["prediction"], colours[predicted]
        )
        assert not colours[-1].any()  # ignored pixels are black
        assert abs(shown["image"].astype(int) - original.image.permute(1, 2, 0).numpy()).mean() < 10
        red = (shown["errors"] == (200, 30, 30)).all(-1)
        assert np.array_equal(red, (labels != predicted) & (labels >= 0))
        assert np.array_equal(shown["errors"].any(-1), labels >= 0)
        legend = {each["label"]: each for each in image["classes"]}
        assert legend["cat"]["color"] == "#{:02x}{:02x}{:02x}".format(*colours[0]) and set(legend) == set(CLASSES)
        ious = [each["iou"] for each in image["classes"]]
        assert image["miou"] == pytest.approx(np.mean(ious))


def content(images: int) -> dict[str, Any]:
    """Return results of one benchmark with three classes."""
    row = {
        "mIoU": 50.0, "mIoU_interval": [45.5, 54.5], "boundary_IoU": 30.0, "pixel_accuracy": 70.0, "images": images,
        "ms_per_image": 2.0, "IoU": dict(zip(CLASSES, [90.0, 10.0, None], strict=True)),
        "boundary_IoU_per_class": dict(zip(CLASSES, [60.0, 0.0, None], strict=True)), "shipped": False,
        "counts": "counts/mine-1.npz", "protocol": {"hash": "abc"},
    }  # fmt: skip
    shared = {"model": {"family": "Tiny"}, "protocol": {"inference": "single"}, "environment": {"torch": "2"}}
    return {**shared, "benchmarks": {"mine": row}}


def page_of(folder: Path, images: list[dict[str, Any]]) -> Path:
    """Write report.html with these pictures."""
    (folder / "gallery").mkdir(exist_ok=True)
    (folder / "gallery" / "mine-1.json").write_text(json.dumps({"count": 1, "images": images}))
    path = folder / "report.html"
    path.write_text(evaluation_page(folder, content(len(images))))
    return path


def test_text(tmp_path: Path) -> None:
    text = page_of(tmp_path, drawn(opened(tmp_path / "mine"))).read_text()
    assert "45.50 to 54.50" in text and "Evaluation of Tiny, single pass" in text
    assert "<b>hen" not in text and text.count("&lt;b&gt;hen") == 4 and "a &amp; b 0" in text
    (tmp_path / "gallery" / "mine-1.json").write_text("{")  # damaged
    text_only = evaluation_page(tmp_path, content(3))
    assert "cat" in text_only and "<figure>" not in text_only
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


def focus(page: Page) -> str:
    """Return text or label of the focused element."""
    found: str = page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent")
    return found


def test_in_a_browser(browser_page: Page, tmp_path: Path) -> None:
    page, problems = browser_page, list[str]()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.extend([request.url] if request.url.startswith("http") else []))
    page.goto(page_of(tmp_path, drawn(opened(tmp_path / "mine"))).as_uri())
    assert page.locator(".enlarge img").count() == 12
    assert page.evaluate("[...document.images].every(image => image.naturalWidth == 40 && image.alt)")
    seen = []
    for _ in range(20):  # by keyboard only
        page.keyboard.press("Tab")
        seen.append(focus(page))
        if seen[-1].startswith("Enlarge"):
            break
    assert seen[:3] == ["Results", "mine", "Settings"] and "IoU of 3 classes" in "".join(seen) and "IoU" in seen
    dialog = page.locator("dialog")
    assert not dialog.is_visible()
    page.keyboard.press("Enter")
    assert dialog.is_visible() and dialog.locator("img").count() == 4 and focus(page) == "Close"
    first = dialog.locator("p").inner_text()
    page.keyboard.press("ArrowRight")
    second = dialog.locator("p").inner_text()
    dialog.get_by_text("Previous").click()
    assert dialog.locator("p").inner_text() == first != second
    dialog.get_by_text("Next").press("Enter")
    assert dialog.locator("p").inner_text() == second and "<b>hen</b>" in first
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    label = page.locator(".enlarge").nth(1).get_attribute("aria-label")
    page.wait_for_function("label => document.activeElement.ariaLabel == label", arg=label, timeout=5000)
    for column, names, first in ((1, ["cat", "dog", "<b>hen</b>"], "descending"), (0, sorted(CLASSES), "ascending")):
        head, orders = page.locator(".sortable th button").nth(column), []
        for direction in (first, "descending" if first == "ascending" else "ascending"):
            head.press("Enter")
            orders.append(page.locator(".sortable tbody th").all_inner_texts())
            assert head.locator("..").get_attribute("aria-sort") == direction
        assert orders == [names, names[::-1]] and page.locator(".sortable [aria-sort]").count() == 1
    assert problems == []


def test_many_images(browser_page: Page, tmp_path: Path) -> None:
    """The page of 500 images has less than 3 kB per image besides its pictures (time: scripts/measure_report.py)."""
    images = drawn(opened(tmp_path / "mine"))
    many = [{**images[i % 3], "stem": f"{i}"} for i in range(500)]
    path = page_of(tmp_path, many)
    size = sum(len(uri) for image in many for uri in image["pictures"].values())
    assert path.stat().st_size < size + 500 * 3000
    browser_page.goto(path.as_uri())
    assert browser_page.locator(".enlarge").count() == 500
