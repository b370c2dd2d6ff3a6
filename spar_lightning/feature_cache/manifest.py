"""manifest.json: whose features lie in a cache, told by everything that they depend on.

The fingerprint of the identity is repeated in every shard. Where a configuration differs, each
difference is named, and the command that builds the right features.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from spar_lightning.feature_cache.shard import CacheError
from spar_lightning.files.hashing import hash_json


def compare(root: Path, identity: dict[str, Any]) -> str:
    """Return the fingerprint of the cache in `root`, which its shards carry.

    Raises:
        CacheError: It has another identity.
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
        f"The features in {root} were made by another configuration:\n{rows}\n"
        f"Restore these settings, or build the right features: spar cache with the same --config and "
        f"--data.cache {other} (rendered scenes: --data.root), or delete the old ones."
    )


def upgraded(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity in today's keys: version 0.1 recorded a backbone's class path instead of its family."""
    teacher = identity.get("teacher")
    if not isinstance(teacher, dict) or "backbone" not in teacher:
        return identity
    others = {key: value for key, value in teacher.items() if key != "backbone"}
    return {**identity, "teacher": {"family": str(teacher["backbone"]).rpartition(".")[2], **others}}


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a cache, checked.

    Raises:
        CacheError: There is none, or it is damaged.
    """
    path = root / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        whole = manifest["fingerprint"] == hash_json(manifest["identity"])
    except FileNotFoundError as error:
        raise CacheError(f"{root} holds no feature cache: {path} does not exist.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({error}). {_RESTORE}") from error
    if not whole:
        raise CacheError(f"{path} is damaged: its fingerprint is not that of its identity. {_RESTORE}")
    return manifest


_RESTORE: Final = "Restore it, or delete it: the next start writes it anew, and each shard is compared with it."


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
