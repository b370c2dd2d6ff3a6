"""Keys, options and commands that were renamed after version 0.1.

In files and commands written by a user, an old name raises an error that states the new name. Files that `spar` wrote
(config.yaml of a run, metadata of an export) are converted to the current keys. `upgraded` defines the rules for both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from spar_lightning.errors import UserError

COMMANDS: Final = {"benchmark": "speed"}

# Old and new options, by command.
OPTIONS: Final[dict[str, dict[str, str]]] = {
    "fit": {"--ckpt_path": "--resume"},
    "validate": {"--ckpt_path": "--weights"},
    "speed": {"--rounds": "--repeats"},
    "predict": {"--max-side": "--max_side"},
    "cache": {"--plan-only": "--plan_only", "--windows-per-second": "--windows_per_second"},
}

# Old and new keys, by block of the configuration.
KEYS: Final = {"model": {"geometry": "patch_fit"}, "data": {"prefix": "cache_activations"}}

REFINE: Final = {"none": None, "lposs": "pretrained", "lposs_spar": "spar"}


def upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a configuration of version 0.1 to the current keys; a current configuration is unchanged."""
    content = dict(content)
    for name, keys in KEYS.items():
        block = {keys.get(key, key): value for key, value in _block(content, name).items()}
        if name == "model" and "refine" in block:
            block["refine"] = _refinement(block["refine"])
        if name == "data" and _is_settings(block.get("augmentation")):
            block["augmentation"] = _augmentation(block["augmentation"])
        if isinstance(content.get(name), Mapping):
            nested = name == "data" and "init_args" in content[name]
            content[name] = {**content[name], "init_args": block} if nested else block
    return content


def check_renamed(content: Any, where: str) -> None:
    """Raise UserError if a user's configuration contains an old key or an old form of a value.

    Args:
        content: Content of the YAML file, or of an option.
        where: Name of the file or option for the error message.
    """
    if not isinstance(content, Mapping):
        return
    newer = upgraded(content)
    for name, keys in KEYS.items():
        block, after = _block(content, name), _block(newer, name)
        for key, value in block.items():
            new = keys.get(key, key)
            if new != key or after[new] != value:
                old_text, new_text = (yaml.safe_dump({k: v}, default_flow_style=True).strip()[1:-1]
                                      for k, v in ((key, value), (new, after[new])))  # fmt: skip
                raise UserError(f"{where}: in {name}, `{old_text}` is now `{new_text}`.")


def check_options(command: str, args: Sequence[str]) -> None:
    """Raise UserError if the arguments of a command contain an old option or set an old key."""
    args = args[: args.index("--")] if "--" in args else args
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if new := OPTIONS.get(command, {}).get(name):
            raise UserError(f"{name} is now {new}.")
        path = [part for part in name.removeprefix("--").split(".") if part != "init_args"]
        path = ["model", *path] if path == ["refine"] else path  # option of evaluate and predict
        # Nested settings such as --model.refine.k belong to a class or preset that another argument names.
        if not name.startswith("--") or path[0] not in KEYS or len(path) > 2:
            continue
        try:
            content: Any = yaml.safe_load(value if equals else next(iter(args[i + 1 : i + 2]), ""))
        except yaml.YAMLError:
            continue
        for part in reversed(path):
            content = {part: content}
        check_renamed(content, name)


def written_by_a_run(config: Path) -> bool:
    """Return whether a file is a configuration that `spar fit` wrote to a run folder."""
    name = config.name == "config.yaml" or config.match("config-resume-*.yaml")
    return name and ((config.parent / "train.log").exists() or (config.parent / "checkpoints").is_dir())


def _block(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments in the block `model` or `data`; `data` may have the form with class_path."""
    block = content.get(name)
    if isinstance(block, Mapping) and name == "data":
        block = block.get("init_args", block)
    return dict(block) if isinstance(block, Mapping) else {}


def _is_settings(value: Any) -> bool:
    return isinstance(value, str | Mapping)


def _refinement(value: Any) -> Any:
    """Return a refinement with class_path; version 0.1 used preset names, or the settings of LPOSS alone."""
    if isinstance(value, str) and value in REFINE:
        value = REFINE[value] and {"preset": REFINE[value]}
    if not isinstance(value, Mapping) or not value or value.keys() & {"class_path", "init_args"}:
        return value
    return {"class_path": "spar_lightning.refinement.LPOSS", "init_args": dict(value)}


def _augmentation(value: str | Mapping[str, Any]) -> Any:
    """Return the current form: a preset is a setting, and scale null (the image's own size) is the preset `none`."""
    if isinstance(value, str):
        return {"preset": value}
    return (
        {"preset": "none", **value} if "scale" in value and value["scale"] is None and "preset" not in value else value
    )
