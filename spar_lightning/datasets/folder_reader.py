"""Reader for the images of a folder and its subfolders."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from spar_lightning.datasets.image_source import is_image
from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.datasets.tar_reader import Member
from spar_lightning.files.walk import files_below

WHOLE: Final = 1 << 26  # bytes; larger files are not read as a whole


def status(file: Path) -> os.stat_result:
    """Return the status of an image file.

    Raises:
        ShardError: The file is a broken link or cannot be reached.
    """
    try:
        return file.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise ShardError(f"{file} is a link to a file that does not exist. Fix or remove the link.") from error
        raise ShardError(f"{file} cannot be read ({error.strerror}). Make it readable.") from error


def images_below(folder: Path) -> list[str]:
    """Return the images below a folder as sorted relative paths; hidden files are left out.

    Raises:
        FolderError: A folder cannot be read.
    """
    return [name for name in files_below(folder) if is_image(name)]


def walk_folder(location: str) -> Iterator[Member]:
    """Yield every image below a folder; the key includes the subfolders.

    Raises:
        ShardError: An image cannot be read.
        FolderError: A folder cannot be read.
    """
    for name in images_below(Path(location)):
        path = Path(location) / name
        found = status(path)
        if not stat.S_ISREG(found.st_mode):  # a device or a named pipe
            continue
        try:
            content = path.read_bytes() if found.st_size <= WHOLE else path
        except OSError as error:
            raise ShardError(f"{location}: {name} cannot be read ({error.strerror}). Make it readable.") from error
        yield Member(str(PurePosixPath(name).with_suffix("")), name, 0, content)
