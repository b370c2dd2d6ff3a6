"""Manifest of a feature cache (manifest.json): its cache key, which contains all settings the features depend on.

The fingerprint is the hash of the cache key and is repeated in every shard. If the cache key of a configuration differs
from the manifest, the error lists each difference and the command that builds the right features.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from spar_lightning.feature_cache.shard import CacheError
from spar_lightning.files.hashing import hash_json


def compare(root: Path, identity: dict[str, Any], rebuild: str) -> str:
    """Return the fingerprint of the cache in `root`, which its shards carry; `rebuild` is part of the error message.

    Raises:
        CacheError: The cache key differs from `identity`, or the manifest is missing or damaged.
    """
    manifest = read_manifest(root)
    found = upgraded(manifest["identity"])
    if found == identity:
        fingerprint: str = manifest["fingerprint"]
        return fingerprint
    theirs, ours = dict(_flat(found)), dict(_flat(identity))
    names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    rows = "\n".join(f"  {name}: cache {theirs.get(name)}, configuration {ours.get(name)}" for name in names)
    other = root.with_name(f"{root.name}-{hash_json(identity, 8)}")
    raise CacheError(
        f"The features in {root} were computed with a different configuration:\n{rows}\n"
        f"Restore these settings, delete the old features, or build new ones: {rebuild.format(other=other)}."
    )


def upgraded(identity: dict[str, Any]) -> dict[str, Any]:
    """Convert a cache key to the current names; version 0.1 recorded the class path of a backbone, not its family."""
    teacher = identity.get("teacher")
    if not isinstance(teacher, dict) or "backbone" not in teacher:
        return identity
    others = {key: value for key, value in teacher.items() if key != "backbone"}
    return {**identity, "teacher": {"family": str(teacher["backbone"]).rpartition(".")[2], **others}}


def read_manifest(root: Path) -> dict[str, Any]:
    """Return the content of the manifest, checked against its fingerprint.

    Raises:
        CacheError: The manifest does not exist or is damaged.
    """
    path = root / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        whole = manifest["fingerprint"] == hash_json(manifest["identity"])
    except FileNotFoundError as error:
        raise CacheError(f"{root} does not contain a feature cache or an index: {path} does not exist.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({error}). {_RESTORE}") from error
    if not whole:
        raise CacheError(f"{path} is damaged: its fingerprint does not match its identity. {_RESTORE}")
    return manifest


_RESTORE: Final = "Restore or delete it. If deleted, the next start writes it again and compares each shard with it."


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested mappings."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
