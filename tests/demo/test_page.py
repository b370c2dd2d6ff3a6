"""The page of `spar demo` in headless Chromium: interactions, wrong uploads, simultaneous visitors, no other hosts."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from spar_lightning.cli import main
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.feature_index import FeatureIndex
from tests.demo.test_side_by_side import CLASSES, bomb

pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SILENT = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
LOCAL = ("http://127.0.0.1:", "data:", "blob:")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        Image.fromarray(render(3, i, 192, 160).image).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def address(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the page from this process; a connection to another host is an error."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["index", str(photos), "--weights", "tiny", "--out", str(folder / "idx")]) == 0
    others: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, to: Any) -> None:
        if self.family != socket.AF_UNIX and to[0] not in ("127.0.0.1", "localhost", "::1"):
            others.append(to)
        connect(self, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        from spar_lightning.demo.page import build, serve
        from spar_lightning.demo.side_by_side import SideBySide
        from spar_lightning.demo.stored import StoredImages
        from spar_lightning.student import load_student

        stored = StoredImages(FeatureIndex(folder / "idx"))
        page = build(SideBySide(load_student("tiny")), sorted(photos.iterdir()), CLASSES, stored)
        yield serve(page, "127.0.0.1", None)
        page.close()
    assert not others


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SILENT)
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        others: list[str] = []
        page.on("request", lambda request: None if request.url.startswith(LOCAL) else others.append(request.url))
        page.goto(address)
        page.wait_for_selector("#segment")
        yield page
        assert not others
        browser.close()


def segmented(page: Page, message: str = "Done.") -> str:
    """Press the button, and return the message when it contains the expected one."""
    page.click("#segment")
    page.wait_for_function(f"document.querySelector('#message').innerText.includes({message!r})", timeout=60_000)
    page.wait_for_function("document.querySelectorAll('.generating, .pending').length == 0", timeout=60_000)
    return page.inner_text("#message")


def upload(page: Page, file: Path) -> None:
    page.set_input_files("#image input[type=file]", str(file))
    page.wait_for_selector("#image img")


def modes(page: Page) -> list[str]:
    """Return the titles above the pictures."""
    return list(dict.fromkeys(filter(None, map(str.strip, page.locator(".mode").all_inner_texts()))))


def test_ten_interactions(page: Page, photos: Path) -> None:
    assert "image is missing" in segmented(page, "image is missing")  # 1
    upload(page, photos / "0.png")  # 2
    segmented(page)  # 3
    assert len(modes(page)) == 3 and all(" ms" in title for title in modes(page))
    assert page.locator(".picture img").count() == 6
    assert "red dot" in page.inner_text("#scores")
    page.get_by_label("single pass, full attention").uncheck()  # 4
    page.get_by_label("sliding window (teacher)").uncheck()  # 5
    segmented(page)  # 6
    page.wait_for_function("document.querySelectorAll('.picture img').length == 2")
    assert len(modes(page)) == 1 and "windowed" in modes(page)[0]
    page.fill("#classes textarea", "ship; plain")  # 7
    assert "ship" in segmented(page, "ship")
    page.fill("#classes textarea", "plain; blue dot: blue dot")
    page.fill("#side input[type=number]", "64")  # 8
    page.press("#side input[type=number]", "Tab")
    segmented(page)  # 9
    assert "blue dot" in page.inner_text("#scores") and "red dot" not in page.inner_text("#scores")
    page.get_by_role("tab", name="Search").click()  # 10
    page.click("#search")
    page.wait_for_function("document.querySelector('#query_message').innerText.includes('3 images searched')")
    assert page.locator("#found img").count() >= 1
    page.fill("#query_label textarea, #query_label input", "nothing")
    page.click("#search")
    page.wait_for_function("document.querySelector('#query_message').innerText.includes('not one of the classes')")
    page.get_by_role("tab", name="Segment").click()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.png", b"nothing", "cannot be read as an image"),
        ("bomb.png", bomb(30_000), "30000 x 30000 pixels"),
    ],
    ids=["text", "bomb"],
)
def test_wrong_files(name: str, content: bytes, message: str, page: Page, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    page.reload()
    page.wait_for_selector("#segment")
    page.set_input_files("#image input[type=file]", str(tmp_path / name))
    page.wait_for_selector("#image img", state="attached")
    assert str(tmp_path) not in segmented(page, message)


def test_a_file_of_50_mb(page: Page, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(os.urandom(50 * 2**20))
    page.reload()
    page.wait_for_selector("#segment")
    page.set_input_files("#image input[type=file]", str(tmp_path / "large.png"))
    page.wait_for_function("document.body.innerText.includes('exceed the maximum allowed size')", timeout=60_000)
    page.reload()
    upload(page, photos / "1.png")  # the page still works
    segmented(page)


def test_eight_visitors_at_once(address: str, photos: Path) -> None:
    from gradio_client import Client, handle_file  # type: ignore[import-untyped]

    def visit(i: int) -> Any:
        client = Client(address, verbose=False)
        return client.predict(handle_file(photos / f"{i % 3}.png"), CLASSES, ["single pass, full attention"], 128,
                              api_name="/run")  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(visit, range(8)))
    assert [result[0] for result in found] == ["Done."] * 8
    assert found[0][1] == found[3][1] != found[1][1]  # the same image gives the same scores


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from spar_lightning.demo import page

    served: list[Callable[..., Any]] = []
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda self: served.append(self.close()))
    assert main(["demo"]) == 0 and len(served) == 1
    assert "http://127.0.0.1:" in capsys.readouterr().out
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for place in (["--port", str(taken.getsockname()[1])], ["--port", "99999"], ["--host", "192.0.2.1"]):
            assert main(["demo", *place]) == 2 and "Cannot listen on" in capsys.readouterr().err
    monkeypatch.setattr("spar_lightning.cli.demo.find_spec", lambda name: None)
    assert main(["demo"]) == 2 and 'pip install "spar-lightning[demo]"' in capsys.readouterr().err
    assert page.FONTS
