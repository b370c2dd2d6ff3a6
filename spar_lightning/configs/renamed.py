"""Keys, options and commands that were renamed after version 0.1.

In what a user writes they are errors that name the new key. What `spar` itself wrote (config.yaml of a run, metadata
of an export) is read in today's keys.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from spar_lightning.errors import UserError

COMMANDS: Final = {"benchmark": "speed"}

# Block and key of a configuration.
KEYS: Final = {("model", "geometry"): "patch_fit", ("data", "prefix"): "cache_activations"}

OPTIONS: Final = {"--ckpt_path": "--weights", "--rounds": "--repeats"}

REFINE: Final = {"none": None, "lposs": "pretrained", "lposs_spar": "spar"}
LPOSS: Final = "spar_lightning.refinement.LPOSS"


def check_renamed(content: Any, where: str) -> None:
    """Raise UserError if a configuration that a user wrote has an old key or an old form of a value."""
    for old, new in _old(content):
        raise UserError(f"{where}: {old} is now {new}.")


def check_options(args: Sequence[str]) -> None:
    """Raise UserError if an argument of a command is an old option, or spelled with hyphens."""
    names = [arg.partition("=")[0] for arg in args]
    for i, (arg, name) in enumerate(zip(args, names, strict=True)):
        if not name.startswith("--"):
            continue
        if "-" in name[2:]:
            raise UserError(f"{name}: options are spelled with underscores. Write {'--' + name[2:].replace('-', '_')}.")
        if name in OPTIONS:
            raise UserError(f"{name} is now {OPTIONS[name]}.")
        for (block, key), new in KEYS.items():
            if name == f"--{block}.{key}":
                raise UserError(f"{name} is now --{block}.{new}.")
        value = arg.partition("=")[2] if "=" in arg else next(iter(args[i + 1 : i + 2]), "")
        if name in ("--refine", "--model.refine") and value in REFINE:
            preset = REFINE[value]
            new = f"{name} LPOSS {name}.preset {preset}" if preset else f"{name} null"
            raise UserError(f"{name} {value} is now {new}.")
        if name == "--data.augmentation" and value.isidentifier():
            raise UserError(f"{name} {value} is now {name}.preset {value}.")


def _old(content: Any) -> Iterator[tuple[str, str]]:
    """Yield every old key or value of a configuration, with what replaces it."""
    model, data = _block(content, "model"), _block(content, "data")
    for (name, key), new in KEYS.items():
        if key in {"model": model, "data": data}[name]:
            yield f"{name}.{key}", f"{name}.{new}"
    refine = model.get("refine")
    if isinstance(refine, str) and refine in REFINE:
        preset = REFINE[refine]
        new = f"{{class_path: LPOSS, init_args: {{preset: {preset}}}}}" if preset else "null"
        yield f"model.refine: {refine}", f"model.refine: {new}"
    elif _is_settings(refine):
        yield f"model.refine: {refine}", f"model.refine: {{class_path: LPOSS, init_args: {refine}}}"
    if isinstance(data.get("augmentation"), str):
        name = data["augmentation"]
        yield f"data.augmentation: {name}", f"data.augmentation: {{preset: {name}}}"


def upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that version 0.1 wrote in today's keys; one of today's as it is."""
    content = dict(content)
    for name in ("model", "data"):
        block = dict(_block(content, name))
        block = {KEYS.get((name, key), key): value for key, value in block.items()}
        if name == "model" and "refine" in block:
            block["refine"] = _refinement(block["refine"])
        if name == "data" and "augmentation" in block:
            block["augmentation"] = _augmentation(block["augmentation"])
        if name in content:
            nested = name == "data" and isinstance(content[name], Mapping) and "init_args" in content[name]
            content[name] = {**content[name], "init_args": block} if nested else block
    return content


def _block(content: Any, name: str) -> dict[str, Any]:
    """Return the arguments of `model` or `data`, the latter with or without class_path."""
    block = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(block, Mapping):
        return {}
    inner = block.get("init_args", block) if name == "data" else block
    return dict(inner) if isinstance(inner, Mapping) else {}


def _refinement(value: Any) -> Any:
    if isinstance(value, str) and value in REFINE:
        return REFINE[value] and {"class_path": LPOSS, "init_args": {"preset": REFINE[value]}}
    return {"class_path": LPOSS, "init_args": dict(value)} if _is_settings(value) else value


def _augmentation(value: Any) -> Any:
    if isinstance(value, str):
        return {"preset": value}
    if isinstance(value, Mapping) and "preset" not in value:  # all settings were recorded; a null scale was meant
        return {"preset": "none" if value.get("scale") is None else "released", **value}
    return value


def _is_settings(refine: Any) -> bool:
    """Tell the settings of an LPOSS, as version 0.1 had them, from a class path with arguments."""
    return isinstance(refine, Mapping) and bool(refine) and "class_path" not in refine
