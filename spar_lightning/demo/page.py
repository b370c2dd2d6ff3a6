"""The page of `spar demo`, made with Gradio.

The page and its server send nothing to other hosts: no usage statistics, no fonts, no check for new versions, no files
of addresses that visitors send.
"""

import logging
import math
import socket
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import Any, Final, NoReturn
from uuid import uuid4

import gradio as gr
from gradio import processing_utils
from PIL import Image

from spar_lightning.demo.limits import MOST_BYTES, read_classes, read_upload
from spar_lightning.demo.side_by_side import LARGEST, SideBySide
from spar_lightning.demo.stored import StoredImages
from spar_lightning.errors import UserError

FONTS: Final = ("system-ui", "sans-serif")
WAITING: Final = 32  # visitors
INTRODUCTION: Final = """# spar demo
Drop an image, type class names, and compare the modes. `label: name, name` gives a class several names. Every pixel
gets one of the classes, so add a background class. The lower pictures show the features as colors (PCA)."""
STORED: Final = "Images whose features are stored: a query runs the text encoder only."

log = logging.getLogger("spar_lightning")


async def _no_download(url: str, cache_dir: str) -> NoReturn:
    raise gr.Error("Addresses are not loaded. Upload the file.")


processing_utils.async_ssrf_protected_download = _no_download


def build(
    segment: SideBySide, examples: Sequence[Path], classes: str, stored: StoredImages | None, uploads: Path
) -> gr.Blocks:
    """Return the page.

    Args:
        segment: Function that segments an image in several modes.
        examples: Image files to choose from, in `uploads`.
        classes: Class names at the start.
        stored: Images of an index, for a second tab; None leaves it out.
        uploads: Folder of the files that visitors send, which is that of Gradio.
    """
    page: gr.Blocks
    with gr.Blocks(title="spar demo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Segment"):
            _segment_tab(segment, examples, classes, uploads)
        if stored is not None:
            with gr.Tab("Search"):
                _search_tab(stored, classes)
    page.queue(max_size=WAITING, api_open=False, default_concurrency_limit=1)
    return page


_one = Lock()  # one visitor at a time, however the function is called


def _in_words(count: int) -> Callable[[Callable[..., list[Any]]], Callable[..., list[Any]]]:
    """Return a decorator: an error becomes a message, followed by `count` outputs that stay as they are."""

    def decorated(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        @wraps(function)
        def run(*inputs: Any) -> list[Any]:
            try:
                with _one:
                    return function(*inputs)
            except UserError as error:
                message = f"**{error}**"
            except Exception:
                log.exception("The page could not answer.")
                message = "**The request could not be processed. The log of the server has the reason.**"
            return [message, *(gr.skip() for _ in range(count))]

        return run

    return decorated


def _segment_tab(segment: SideBySide, examples: Sequence[Path], classes: str, uploads: Path) -> None:
    """Add the tab that segments an image."""

    @_in_words(1 + 3 * len(segment.modes))
    def run(path: str | None, text: str, modes: list[str], side: float) -> list[Any]:
        pixels, wanted = read_upload(path, uploads), read_classes(text)
        chosen = [mode for mode in segment.modes if mode in modes]
        panels = dict(zip(chosen, segment(pixels, wanted, chosen, int(side)), strict=True))
        rows = [
            [panel.title, label, f"{100 * area:.1f}", "" if math.isnan(score) else f"{score:.3f}"]
            for panel in panels.values()
            for label, area, score in panel.rows
        ]
        updates: list[Any] = []
        for mode in segment.modes:
            panel = panels.get(mode)
            title = f"**{mode}**, {1000 * panel.seconds:.0f} ms" if panel else ""
            updates += [title, *((_own(panel.picture), _own(panel.colors)) if panel else (None, None))]
        return ["Done.", rows, *updates]

    @_in_words(1)
    def show(path: str | None) -> list[Any]:
        if path is None:
            return ["Choose an image.", None]
        return ["Ready.", _own(Image.fromarray(read_upload(path, uploads).permute(1, 2, 0).numpy()))]

    def choose(event: gr.SelectData) -> str:
        return str(examples[event.index])

    pictures: list[Any] = []
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="Image: drop a file here", file_types=["image"], height=110, elem_id="file")
            image = gr.Image(show_label=False, interactive=False, height=240, format="png", buttons=[], elem_id="image")
            text = gr.Textbox(classes, label="Classes", lines=2, elem_id="classes")
            modes = gr.CheckboxGroup(segment.modes, value=segment.modes, label="Modes", elem_id="modes")
            side = gr.Slider(
                segment.window // 2, LARGEST * segment.window, 4 * segment.window, step=segment.window // 4,
                label="Longest side of the network's input (pixels)", elem_id="side",
            )  # fmt: skip
            button = gr.Button("Segment", variant="primary", elem_id="segment")
            gallery = gr.Gallery(
                [str(path) for path in examples], label="Examples", columns=4, allow_preview=False, height=120,
                object_fit="cover", elem_id="examples", interactive=False,
            )  # fmt: skip
        with gr.Column(scale=3):
            message = gr.Markdown("Choose an image.", elem_id="message")
            with gr.Row():
                for _ in segment.modes:
                    with gr.Column(min_width=160):
                        pictures.append(gr.Markdown(elem_classes="mode"))
                        for _ in ("segmentation map", "features as colors"):
                            picture = gr.Image(
                                show_label=False, interactive=False, buttons=["fullscreen"], format="png",
                                elem_classes="picture",
                            )  # fmt: skip
                            pictures.append(picture)
            table = gr.Dataframe(
                headers=["mode", "class", "area (%)", "mean score"], label="Scores", elem_id="scores",
                interactive=False,
            )  # fmt: skip
    gallery.select(choose, None, file)
    file.change(show, file, [message, image])
    inputs, outputs = [file, text, modes, side], [message, table, *pictures]
    button.click(run, inputs, outputs)
    text.submit(run, inputs, outputs)


def _search_tab(stored: StoredImages, classes: str) -> None:
    """Add the tab that ranks the images of an index by the area of a class."""

    @_in_words(1)
    def search(text: str, label: str) -> list[Any]:
        found = stored(read_classes(text), label or "")
        best = [(_own(picture), f"{name}: {100 * area:.1f} %") for name, area, picture in found.best]
        return [f"{found.images:,} images searched in {found.seconds:.2f} s.", best]

    gr.Markdown(STORED)
    with gr.Row():
        text = gr.Textbox(classes, label="Classes", elem_id="query_classes", scale=3)
        label = gr.Textbox("", label="Rank by this class (empty: the first)", elem_id="query_label", scale=1)
        button = gr.Button("Search", variant="primary", elem_id="search", scale=0)
    message = gr.Markdown(elem_id="query_message")
    gallery = gr.Gallery(
        label="Largest area first", columns=4, object_fit="contain", elem_id="found", height="auto", format="png"
    )
    for event in (button.click, text.submit, label.submit):
        event(search, [text, label], [message, gallery])


def _own(picture: Image.Image) -> Image.Image:
    """Give a picture a file of its own: Gradio would write equal ones to one file while other visitors load it."""
    picture.info["visit"] = uuid4().hex
    return picture


def serve(page: gr.Blocks, host: str, port: int | None) -> str:
    """Serve the page in threads of this process, and return its address.

    Args:
        page: The page.
        host: Address to listen on.
        port: Port; None chooses a free one.

    Raises:
        UserError: The address or the port cannot be used.
    """
    theme = gr.themes.Default(font=FONTS, font_mono=("monospace",))
    try:
        socket.create_server((host, port or 0)).close()  # gradio has several errors for it
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
            max_file_size=MOST_BYTES, theme=theme, footer_links=[], ssr_mode=False,
        )  # fmt: skip
    except (OSError, OverflowError) as error:  # the name is unknown, the port is taken or not a port
        raise UserError(f"Cannot listen on {host}, port {port}: {error}. Pass another --host or --port.") from error
    return str(address)
