"""The page of `spar demo` in headless Chromium: interactions, wrong uploads, simultaneous visitors, no other hosts."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from spar_lightning.cli import main
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.feature_index import FeatureIndex
from tests.demo.test_limits import bomb
from tests.demo.test_side_by_side import CLASSES

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
    """Serve the page from this process; a connection to another host, or a look-up of its name, is an error."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["index", str(photos), "--weights", "tiny", "--out", str(folder / "idx")]) == 0
    uploads = folder / "uploads"
    shutil.copytree(photos, uploads / "examples")
    others: list[Any] = []

    def watch(patch: pytest.MonkeyPatch, owner: Any, name: str, host: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if (found := host(*args)) not in (None, "127.0.0.1", "localhost", "::1", "0.0.0.0"):
                others.append((name, found))
            return original(*args, **kwargs)

        patch.setattr(owner, name, watched)

    def of_address(self: socket.socket, to: Any) -> Any:
        return None if self.family == socket.AF_UNIX else to[0]

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, socket.socket, "connect", of_address)
        watch(patch, socket.socket, "connect_ex", of_address)
        watch(patch, socket, "getaddrinfo", lambda host, *_: host)
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        from spar_lightning.demo.page import build, serve
        from spar_lightning.demo.side_by_side import SideBySide
        from spar_lightning.demo.stored import StoredImages
        from spar_lightning.student import load_student

        stored = StoredImages(FeatureIndex(folder / "idx"))
        examples = sorted((uploads / "examples").iterdir())
        page = build(SideBySide(load_student("tiny")), examples, CLASSES, stored, uploads)
        try:
            yield serve(page, "127.0.0.1", None)
        finally:
            page.close()
    assert not others


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SILENT)
        page = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
        others: list[str] = []
        page.on("request", lambda request: None if request.url.startswith(LOCAL) else others.append(request.url))
        page.goto(address)
        page.wait_for_selector("#segment")
        yield page
        browser.close()
    assert not others


def segmented(page: Page, message: str = "Done.") -> str:
    """Press the button, and return the message when it contains the expected one."""
    page.click("#segment")
    page.wait_for_function(f"document.querySelector('#message').innerText.includes({message!r})", timeout=60_000)
    page.wait_for_function("document.querySelectorAll('.generating, .pending').length == 0", timeout=60_000)
    return page.inner_text("#message")


def upload(page: Page, file: Path, message: str = "Ready.") -> str:
    """Load the page again, upload a file, and return the message."""
    page.reload()
    page.wait_for_selector("#segment")
    page.set_input_files("#file input[type=file]", str(file))
    page.wait_for_function(f"document.querySelector('#message').innerText.includes({message!r})", timeout=60_000)
    return page.inner_text("#message")


def modes(page: Page) -> list[str]:
    """Return the titles above the pictures."""
    return list(dict.fromkeys(filter(None, map(str.strip, page.locator(".mode").all_inner_texts()))))


def test_ten_interactions(page: Page, photos: Path) -> None:
    assert "image is missing" in segmented(page, "image is missing")  # 1
    upload(page, photos / "0.png")  # 2
    page.wait_for_selector("#image img")
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


def test_examples(page: Page) -> None:
    page.reload()
    page.wait_for_selector("#examples img")
    page.locator("#examples img").nth(1).click()
    page.wait_for_function("document.querySelector('#message').innerText.includes('Ready.')", timeout=60_000)
    segmented(page)
    assert page.locator(".picture img").count() == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.png", b"nothing", "cannot be read as an image"),
        ("bomb.png", bomb(30_000), "too many pixels"),
    ],
    ids=["text", "bomb"],
)
def test_wrong_files(name: str, content: bytes, message: str, page: Page, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    upload(page, tmp_path / name, message)
    assert str(tmp_path) not in segmented(page, message)


def test_a_file_of_50_mb(page: Page, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(os.urandom(50 * 2**20))
    page.reload()
    page.wait_for_selector("#segment")
    page.set_input_files("#file input[type=file]", str(tmp_path / "large.png"))
    page.wait_for_function("document.body.innerText.includes('exceed the maximum allowed size')", timeout=60_000)
    upload(page, photos / "1.png")  # the page still works
    segmented(page)


def test_programs_cannot_read_files_of_the_server_or_of_other_hosts(address: str, photos: Path) -> None:
    """Send what the page never sends: paths on the server and an address."""
    good = {"path": str(photos / "0.png"), "meta": {"_type": "gradio.FileData"}}
    for file in (
        {"path": "/etc/passwd"}, {"path": str(photos / "0.png")}, good, "/etc/passwd",
        {"path": "http://other.example/x.png", "meta": {"_type": "gradio.FileData"}},
    ):  # fmt: skip
        data = json.dumps({"data": [file, CLASSES, ["single pass, full attention"], 128]}).encode()
        for route in ("run/run", "call/run"):
            request = Request(f"{address}gradio_api/{route}", data, {"Content-Type": "application/json"})
            try:
                with urlopen(request, timeout=60) as answer:
                    text = answer.read().decode()
                    if route == "call/run":
                        with urlopen(
                            f"{address}gradio_api/call/run/{json.loads(text)['event_id']}", timeout=60
                        ) as more:
                            text = more.read().decode()
            except HTTPError as error:
                text = error.read().decode()
            assert "Done." not in text and "root:" not in text, (file, route, text[:500])


def test_eight_visitors_at_once(page: Page, address: str, photos: Path) -> None:
    visitors = [page.context.new_page() for _ in range(8)]
    for i, visitor in enumerate(visitors):
        visitor.goto(address)
        visitor.wait_for_selector("#segment")
        visitor.set_input_files("#file input[type=file]", str(photos / f"{i % 3}.png"))
    for visitor in visitors:
        visitor.wait_for_function("document.querySelector('#message').innerText.includes('Ready.')", timeout=60_000)
    for visitor in visitors:
        visitor.click("#segment", no_wait_after=True)
    scores = []
    for visitor in visitors:
        visitor.wait_for_function("document.querySelector('#message').innerText.includes('Done.')", timeout=60_000)
        loaded = "[...document.querySelectorAll('.picture img')].filter(image => image.naturalWidth > 0).length == 6"
        visitor.wait_for_function(loaded, timeout=60_000)
        scores.append(visitor.inner_text("#scores"))
        visitor.close()
    assert scores[0] == scores[3] == scores[6] and scores[1] == scores[4] and len(set(scores)) == 3


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    served: list[Callable[..., Any]] = []
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda self: served.append(self.close()))
    assert main(["demo"]) == 0 and len(served) == 1
    assert "http://127.0.0.1:" in capsys.readouterr().out
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for place in (["--port", str(taken.getsockname()[1])], ["--port", "99999"], ["--host", "192.0.2.1"]):
            assert main(["demo", *place]) == 2 and "Cannot listen on" in capsys.readouterr().err
    monkeypatch.setattr("spar_lightning.cli.demo.find_spec", lambda name: None)
    assert main(["demo"]) == 2 and 'pip install "spar-lightning[demo]"' in capsys.readouterr().err
