"""The page of `spar demo`, made with Gradio.

The page and its server send nothing to other hosts: no usage statistics, no fonts, no check for new versions.
"""

import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import gradio as gr
from PIL import Image

from spar_lightning.demo.side_by_side import MOST_BYTES, SideBySide
from spar_lightning.demo.stored import StoredImages
from spar_lightning.errors import UserError

FONTS: Final = ("system-ui", "sans-serif")
INTRODUCTION: Final = """# spar demo
Drop an image, type class names, and compare the modes. `label: name, name` gives a class several names. Every pixel
gets one of the classes, so add a background class. The lower pictures show the features as colors (PCA)."""
STORED: Final = "Images whose features are stored: a query runs the text encoder only."


def build(segment: SideBySide, examples: Sequence[Path], classes: str, stored: StoredImages | None) -> gr.Blocks:
    """Return the page.

    Args:
        segment: Function that segments a file in several modes.
        examples: Image files to choose from.
        classes: Class names at the start.
        stored: Images of an index, for a second tab; None leaves it out.
    """
    page: gr.Blocks
    with gr.Blocks(title="spar demo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Segment"):
            _segment_tab(segment, examples, classes)
        if stored is not None:
            with gr.Tab("Search"):
                _search_tab(stored, classes)
    return page


def _segment_tab(segment: SideBySide, examples: Sequence[Path], classes: str) -> None:
    """Add the tab that segments an image."""

    def run(path: str | None, text: str, modes: list[str], side: int) -> list[Any]:
        chosen = [mode for mode in segment.modes if mode in modes]
        try:
            panels = dict(zip(chosen, segment(path, text, chosen, int(side)), strict=True))
        except UserError as error:
            return [f"**{error}**", [], *(gr.skip() for _ in pictures)]
        rows = [
            [panel.title, label, f"{100 * area:.1f}", "" if math.isnan(score) else f"{score:.3f}"]
            for panel in panels.values()
            for label, area, score in panel.rows
        ]
        updates = []
        for mode in segment.modes:
            panel = panels.get(mode)
            title = f"**{mode}**, {1000 * panel.seconds:.0f} ms" if panel else ""
            updates += [title, *((_own(panel.picture), _own(panel.colors)) if panel else (None, None))]
        return ["Done.", rows, *updates]

    pictures: list[Any] = []
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = gr.Image(sources=["upload", "clipboard"], label="Image", height=280, elem_id="image")
            # The path, not pixels: damaged files are then errors of this package, in words.
            image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
            text = gr.Textbox(classes, label="Classes", lines=2, elem_id="classes")
            modes = gr.CheckboxGroup(segment.modes, value=segment.modes, label="Modes", elem_id="modes")
            side = gr.Slider(
                segment.window // 2, 8 * segment.window, 4 * segment.window, step=segment.window // 4,
                label="Longest side of the network's input (pixels)", elem_id="side",
            )  # fmt: skip
            button = gr.Button("Segment", variant="primary", elem_id="segment")
            gr.Examples([str(path) for path in examples], image, label="Examples")
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
    inputs, outputs = [image, text, modes, side], [message, table, *pictures]
    button.click(run, inputs, outputs, concurrency_limit=1)
    text.submit(run, inputs, outputs, concurrency_limit=1)


def _search_tab(stored: StoredImages, classes: str) -> None:
    """Add the tab that ranks the images of an index by the area of a class."""

    def run(text: str, label: str) -> tuple[Any, ...]:
        try:
            found = stored(text, label)
        except UserError as error:
            return f"**{error}**", []
        message = f"{found.images:,} images searched in {found.seconds:.2f} s."
        return message, [(_own(picture), f"{name}: {100 * area:.1f} %") for name, area, picture in found.best]

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
        event(run, [text, label], [message, gallery], concurrency_limit=1)


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
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, OverflowError) as error:  # the name is unknown, the port is taken or not a port
        raise UserError(f"Cannot listen on {host}, port {port}: {error}. Pass another --host or --port.") from error
    theme = gr.themes.Default(font=FONTS, font_mono=("monospace",))
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
        max_file_size=MOST_BYTES, theme=theme, footer_links=[], ssr_mode=False,
    )  # fmt: skip
    return str(address)
