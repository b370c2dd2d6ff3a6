"""Text embeddings of class names, cached on disk.

Encoding 80 prompts for each of a few hundred names takes minutes, so the cache stores one small file per name. The
cache key consists of the model and weights of the text tower, the templates, and the name. Ranks that need the same
names share the work through these files. They are stored in $SPAR_CACHE, or in spar_lightning in the user's cache
folder if it is not set. They can be deleted at any time.
"""

import io
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spar_lightning.backbones.base import Backbone
from spar_lightning.distributed import is_first_process, local_rank, world_size
from spar_lightning.files.atomic import replace
from spar_lightning.files.hashing import hash_json
from spar_lightning.segmentation.prompts import Classes, Templates, TextClassifier, embed_name, prompt_templates

log = logging.getLogger("spar_lightning")

ALGORITHM = 1  # increase if the same tower, templates and name give a different embedding


def text_classifier(backbone: Backbone, classes: Classes, templates: Templates) -> TextClassifier:
    """Return the text classifier of `classes` for a backbone; cached embeddings are read from disk."""
    prompts = prompt_templates(templates)
    return TextClassifier.from_classes(lambda names: embed_names(backbone, names, prompts), classes)


class TextClassifiers:
    """Text classifiers of one backbone; each is computed only once.

    Args:
        backbone: Backbone with a text encoder; its vision weights do not matter.
        templates: Prompt templates of class names.
    """

    def __init__(self, backbone: Backbone, templates: Templates) -> None:
        self._backbone, self._templates = backbone, templates
        self._known: dict[tuple[tuple[str, tuple[str, ...]], ...], TextClassifier] = {}

    def __call__(self, classes: Mapping[str, tuple[str, ...]]) -> TextClassifier:
        """Return the text classifier for a mapping from label to names."""
        key = tuple(classes.items())
        if key not in self._known:
            self._known[key] = text_classifier(self._backbone, classes, self._templates)
        return self._known[key]


def embed_names(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return one unit vector per name (Q, d); nothing is cached if the backbone has no `text_identity`."""
    identity = backbone.text_identity()
    folder = None if identity is None else folder_of(identity, templates)
    found: dict[str, Tensor] = {}
    # Each rank encodes its own share first. After that, most embeddings of the other ranks are in the cache.
    todo = dict.fromkeys([*names[local_rank() or 0 :: world_size()], *names])
    for name in tqdm(todo, "text embeddings", unit="name", leave=False, delay=2, disable=not is_first_process()):
        kept = None if folder is None else _read(folder, name)
        found[name] = embed_name(backbone.encode_text, name, templates) if kept is None else kept
        if folder is not None and kept is None:
            try:
                _write(folder, name, found[name])
            except OSError as error:  # the folder is full or read-only
                log.warning("Text embeddings are not cached: %s. Set SPAR_CACHE to a writable folder.", error)
                folder = None
    return torch.stack([found[name] for name in names])


def folder_of(identity: dict[str, Any], templates: Sequence[str]) -> Path:
    """Return the cache folder of one text tower and one list of templates.

    Args:
        identity: Cache key of the text tower (`Backbone.text_identity`).
        templates: Prompt templates.
    """
    content = {"algorithm": ALGORITHM, "text": identity, "templates": list(templates)}
    return cache_folder() / "text" / hash_json(content, 16)


def cache_folder() -> Path:
    """Return the cache folder that all runs of a user share."""
    root = os.environ.get("SPAR_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "spar_lightning"
    return Path(root).expanduser()


def _path(folder: Path, name: str) -> Path:
    return folder / f"{hash_json(name, 16)}.npz"


def _read(folder: Path, name: str) -> Tensor | None:
    """Return the cached embedding, or None if the file is missing or damaged (checksum mismatch)."""
    try:
        with np.load(_path(folder, name), allow_pickle=False) as file:
            return torch.from_numpy(file["embedding"]) if str(file["name"]) == name else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(folder: Path, name: str, embedding: Tensor) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, embedding=embedding.numpy(), name=np.array(name))
    replace(_path(folder, name), buffer.getvalue(), folder)
