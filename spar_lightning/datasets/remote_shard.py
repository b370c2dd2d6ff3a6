"""Remote shards: a URL or a `pipe:` command that returns a tar file, read from a child process."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO, Any, Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

from spar_lightning.datasets.shard_error import ShardError

CURL: Final = (
    *("curl", "--fail", "--silent", "--show-error", "--location"),
    *("--connect-timeout", "30", "--retry", "30", "--retry-delay", "2"),
)
PROGRAMS: Final[dict[str, Sequence[str]]] = {
    **dict.fromkeys(("http", "https", "ftp", "ftps", "sftp", "scp"), CURL),
    "gs": ("gsutil", "cat"),
}
# Replacements for URLs that cannot be opened, by scheme.
INSTEAD: Final = {
    "s3": "'pipe:aws s3 cp {} -'",
    "hf": "https://huggingface.co/datasets/OWNER/NAME/resolve/main/FILE",
}
MEANING: Final = {126: " (not executable)", 127: " (command not found)"}  # exit codes of a shell


def is_remote(location: str) -> bool:
    """Return whether a location is a URL or a `pipe:` command instead of a local path."""
    return location.startswith("pipe:") or "://" in location


def check_scheme(location: str) -> None:
    """Raise ShardError if a remote location has a scheme that cannot be opened."""
    scheme = location.partition(":")[0]
    if scheme not in (*PROGRAMS, "pipe", "file"):
        instead = INSTEAD.get(scheme, "pipe: and a command that prints the tar file").format(location)
        raise ShardError(
            f"{location}: {scheme}:// addresses cannot be opened. Allowed: pipe:, file://, "
            f"{', '.join(f'{name}://' for name in PROGRAMS)}. Write {instead}."
        )


def open_remote(location: str) -> Any:
    """Open a remote shard as a file object with `read` and `close`.

    Raises:
        ShardError: The program that reads such locations is not installed, or the scheme is unknown.
    """
    check_scheme(location)
    scheme, _, rest = location.partition(":")
    if scheme == "file":
        return open(url2pathname(urlsplit(location).path), "rb")
    return RemoteShard(location, rest if scheme == "pipe" else [*PROGRAMS[scheme], location])


class RemoteShard:
    """Output of a child process, whose exit code is checked at the end of the output.

    Args:
        location: Location for error messages.
        command: Program and arguments, or a command for the shell.
    """

    def __init__(self, location: str, command: str | list[str]) -> None:
        self.location, self.command = location, command
        self.shell = isinstance(command, str)
        # The messages of a user's own command belong on the terminal.
        self._messages: IO[bytes] | None = None if self.shell else tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command, shell=self.shell, stdout=subprocess.PIPE, stderr=self._messages, bufsize=1 << 16
            )
        except FileNotFoundError as error:
            raise ShardError(
                f"{location} cannot be read: {command[0]} is not installed. Install it, or write pipe: and a command "
                "that prints the tar file."
            ) from error

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer at the end.

        Raises:
            ShardError: The output has ended and the process has failed.
        """
        assert self._process.stdout is not None
        content = self._process.stdout.read(size)
        if len(content) < size and (code := self._process.wait()):
            fix = "Run the command in a shell to see why" if self.shell else "Check the address and the network"
            raise ShardError(f"{self.location} cannot be read: {self._reason(code)}. {fix}.")
        return content

    def _reason(self, code: int) -> str:
        if self._messages is None:
            return f"the command ended with {code}{MEANING.get(code, '')}"
        self._messages.seek(0)
        said = self._messages.read().decode(errors="replace").strip()
        message = said.splitlines()[-1] if said else f"{self.command[0]} ended with {code}"
        answer = re.search(r"returned error: (\d+)", message)
        return f"the server answered {answer[1]}" if answer else message.rstrip(".")

    def close(self) -> None:
        """End the process, if necessary, and close its output."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.terminate()
        self._process.wait()
        if self._messages is not None:
            self._messages.close()

    def __enter__(self) -> "RemoteShard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
