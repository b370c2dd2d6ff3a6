"""Tests of remote shards: a failing program, server or command is named, and is not called a damaged shard."""

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spar_lightning.datasets.remote_shard import RemoteShard, open_remote
from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.datasets.shard_index import expand, scan
from tests.datasets.test_shard_index import KEYS, MEMBERS, keys, write_tar


class Answer(http.server.BaseHTTPRequestHandler):
    """Server that answers every request with the number in its path."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("s3://bucket/sa_0.tar", r"s3://.*pipe:aws s3 cp s3://bucket/sa_0\.tar -"),
        ("hf://datasets/o/n/sa_0.tar", r"hf://.*https://huggingface"),
        ("azure://x/sa_0.tar", r"azure://.*pipe:"),
    ],
)
def test_schemes_that_cannot_be_opened(location: str, words: str) -> None:
    for use in (expand, scan):
        with pytest.raises(ShardError, match=words):
            use(location)


@pytest.mark.parametrize("code", [403, 404, 410])
def test_answers_of_a_server(web: str, code: int) -> None:
    with pytest.raises(ShardError, match=rf"answered {code}") as caught:
        scan(f"{web}/{code}")
    assert "damaged" not in str(caught.value)


def test_a_server_that_cannot_be_reached() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # without listening
        with pytest.raises(ShardError, match=r"curl: \(7\)"):
            scan(f"http://127.0.0.1:{taken.getsockname()[1]}/sa_0.tar")


@pytest.mark.parametrize(
    ("command", "words"),
    [("no_such_command x", "127.*not found"), ("exit 5", r"\b5\b"), ("true", "0 bytes"), ("kill -9 $$", "-9")],
)
def test_commands_that_fail(command: str, words: str) -> None:
    with pytest.raises(ShardError, match=words) as caught:
        scan(f"pipe:{command}")
    assert command in str(caught.value) and "damaged" not in str(caught.value)


def test_a_program_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for location, program in (("https://localhost/a.tar", "curl"), ("gs://bucket/a.tar", "gsutil")):
        with pytest.raises(ShardError, match=rf"{program} is not installed"):
            scan(location)


def test_files_as_urls(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a b.tar", MEMBERS)
    location = f"file://{tmp_path}/a%20b.tar"
    images = scan(location)
    assert keys(images) == KEYS and images[4].read() == images[4].read()
    path.unlink()
    with pytest.raises(ShardError, match="No such file"):
        scan(location)


def test_a_command_ends_when_its_shard_is_closed() -> None:
    with open_remote("pipe:yes") as shard:
        assert isinstance(shard, RemoteShard) and shard.read(4) == b"y\ny\n"
    assert shard._process.returncode is not None
