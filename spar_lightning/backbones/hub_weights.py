"""Weights of models that are published as repositories of the Hugging Face Hub, or copied into a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from spar_lightning.backbones.weights import WeightsError, find
from spar_lightning.files import hub
from spar_lightning.files.hashing import hash_file

FILE: Final = "model.safetensors"


def local(source: str, files: Sequence[str] = (FILE,)) -> Path:
    """Return the local path of weights: an existing file or folder, or a repository that is downloaded once.

    Raises:
        WeightsError: `source` is neither.
        HubError: The repository cannot be read.
    """
    path = Path(source)
    if path.exists():
        return path
    if not hub.is_name(source) or source.startswith("."):
        raise WeightsError(
            f"{source} does not exist. Pass a weight file, a folder with {FILE}, or a name on the Hugging Face Hub "
            "(org/name)."
        )
    return hub.download(source, files)


def identity(source: str, others: Sequence[str]) -> Any:
    """Return the cache key of a model: the name on the Hub, or the hashes of the local files.

    Args:
        source: Name on the Hub, weight file, or folder with model.safetensors, config.json and `others`.
        others: Names of further files that the result depends on.
    """
    path = Path(source)
    if not path.is_dir():
        return hash_file(path) if path.exists() else source
    find(source, (FILE,))  # raises if it is missing
    return {name: hash_file(path / name) for name in (FILE, "config.json", *others) if (path / name).is_file()}


def base_model(source: str) -> dict[str, str]:
    """Return the entry of the model card for weights; empty if they are local."""
    return {"base_model": source.partition("@")[0]} if hub.is_name(source) and not Path(source).exists() else {}


def text_model(source: str, cls: Any, tokenizer: Any, files: Sequence[str]) -> tuple[Any, Any]:
    """Load a frozen text encoder and its tokenizer with transformers.

    Args:
        source: Name on the Hub or folder.
        cls: Class of the text encoder in transformers.
        tokenizer: Class of the tokenizer in transformers.
        files: Files of the tokenizer.

    Raises:
        WeightsError: The files are missing, or tensors are missing in them.
    """
    folder = local(source, (FILE, "config.json", *files))
    try:
        tower, found = cls.from_pretrained(folder, output_loading_info=True, dtype="float32", local_files_only=True)
        tokens = tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises different exceptions
        raise WeightsError(
            f"{source}: the text encoder or its tokenizer cannot be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Needed: {FILE}, config.json, and one of {', '.join(files)}."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise WeightsError(f"{source} does not match {cls.__name__}: {missing[0]} is missing.")
    return tower.eval().requires_grad_(False), tokens
