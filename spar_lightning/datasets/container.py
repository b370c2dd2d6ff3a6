"""Kind of a file, recognized by its first bytes instead of its name.

Tar files are read, plain or gzipped. Other files that people have under the name of a shard are reported by their kind:
"damaged" would make them download the same file again.
"""

import tarfile
from typing import Final

from spar_lightning.datasets.shard_error import ShardError

BLOCK: Final = 512  # bytes per block of a tar
GZIP: Final = b"\x1f\x8b"

# First bytes of compressed files, with the command that prints their content.
COMPRESSED: Final = {
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
    b"\x1f\x9d": ("compress", "gzip -dc"),
    GZIP: ("gzip twice", "gzip -dc"),
}
ARCHIVES: Final = {b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "RAR"}
IMAGES: Final = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
PAGES: Final = (b"<!doctype", b"<html", b"<?xml")


def check_tar(start: bytes, location: str) -> None:
    """Raise ShardError if a file is recognized as something other than a tar file.

    Args:
        start: First `BLOCK` bytes of the file, after gzip.
        location: Location for the error message.
    """
    if not start:
        raise ShardError(f"{location} is empty (0 bytes). Download it again, or leave it out.")
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
        return  # the name of the first member may look like another kind: BMW.jpg
    except tarfile.TarError:
        pass
    for magic, (name, command) in COMPRESSED.items():
        if start.startswith(magic):
            raise ShardError(
                f"{location} is compressed with {name}. Allowed: tar files, plain or gzipped. Unpack it, or set "
                f"data.shards to a command that does so, such as 'pipe:{command} FILE'."
            )
    for magic, name in ARCHIVES.items():
        if start.startswith(magic):
            raise ShardError(
                f"{location} is a {name} archive. Allowed: tar files, plain or gzipped. Unpack it and set data.shards "
                "to the folder."
            )
    if start.startswith(IMAGES):
        raise ShardError(
            f"{location} is a single image, not an archive. Allowed: tar files and folders. Set data.shards to the "
            "folder of the image."
        )
    if start.lstrip().lower().startswith(PAGES):
        raise ShardError(
            f"{location} is a web page, not an archive, probably an error page of the server. Get a new download link."
        )
