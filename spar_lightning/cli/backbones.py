"""`spar backbones`: list the backbones, show the parts of one, run the interface checks.

Attributes are read from an instance with random weights, unless arguments name weights; without arguments the instance
is on the meta device and takes no memory.
"""

import copy
import inspect
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any
from unittest import SkipTest

import torch
from jsonargparse import ArgumentParser as ConfigParser

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.registry import class_path, find_backbone, plugins, printable, subclasses
from spar_lightning.cli.help import CommandParser
from spar_lightning.errors import UserError
from spar_lightning.testing import backbone_checks
from spar_lightning.testing.reference import Reference

ACTIONS = {
    "list": (
        "List the built-in backbones and those of installed plugins, with window, patch size and dimension.",
        ("spar backbones", "spar backbones list"),
    ),
    "show": (
        "Show one backbone: window, patch size, normalization, and the parameter groups that model.trainable accepts, "
        "with their sizes.\n\nArguments after the name go to the class, such as --model ViT-L-16-SigLIP2-512.",
        ("spar backbones show SigLIP2", "spar backbones show SigLIP2 --model ViT-L-16-SigLIP2-512"),
    ),
    "check": (
        "Run the interface checks of spar_lightning.testing on a backbone with random weights: shapes, sizes, packing, "
        "positions, parameter groups, weights, text encoder. Exit code 1 if one fails.\n\nOther arguments after the "
        "name go to the class.",
        ("spar backbones check Tiny", "spar backbones check SigLIP2 --model ViT-B-32-SigLIP2-256"),
    ),
}


def run(args: Sequence[str]) -> int:
    """Run `list`, `show` or `check`."""
    if args and args[0] in ACTIONS:
        action, rest = args[0], args[1:]
    else:
        action, rest = "", args
    text, examples = ACTIONS[action] if action else (DESCRIPTION, (*ACTIONS["list"][1][:1], *ACTIONS["check"][1][:1]))
    usage = {"": "[list | show NAME | check NAME]", "list": " "}.get(action, "NAME [arguments of the class]")
    parser = CommandParser(f"spar backbones {action}".strip(), text, examples, usage)
    if action in ("show", "check"):
        parser.add_argument("name", nargs="?", help="Class name of a built-in or installed backbone, or its full path.")
    if action == "check":
        parser.add_argument(
            "--reference",
            help="Path of a function, such as my_vit.reference: from a backbone and images (1, 3, H, W) uint8 to the "
            "features of the original library, with the weights of the backbone. Rotary embeddings, mean and std "
            "can only be checked with it.",
        )
        parser.add_argument("--json", action="store_true", help="Print the results as JSON.")
    given, arguments = parser.parse_known_args(rest)
    if action in ("show", "check"):
        if given.name is None:
            raise UserError(f"Pass a backbone: spar backbones {action} NAME. `spar backbones` lists the names.")
        cls = find_backbone(given.name)
        if action == "show":
            return _show(cls, arguments)
        return _check(cls, arguments, given.reference and _function(given.reference), given.json)
    if arguments:
        allowed = "" if action else " Allowed: list, show NAME and check NAME."
        raise UserError(f"spar backbones{' list' if action else ''}: unexpected argument {arguments[0]!r}.{allowed}")
    return _list()


DESCRIPTION = """List backbones and plugins, show the parts of one, run the interface checks.

`spar backbones show --help` and `spar backbones check --help` describe the actions."""


def make(cls: type[Backbone], arguments: Sequence[str]) -> Backbone:
    """Return a backbone with random weights, unless the arguments name weights."""
    parser = ConfigParser(f"spar backbones ... {cls.__name__}", exit_on_error=False)
    parser.add_class_arguments(cls, as_positional=False)
    pretrained = inspect.signature(cls).parameters.get("pretrained")
    if pretrained and isinstance(pretrained.default, str):  # a name of weights; None means random ones
        parser.set_defaults(pretrained=None)
    try:
        settings = parser.instantiate(parser.parse_args(list(arguments)))
    except Exception as error:  # jsonargparse raises several types
        raise UserError(f"{cls.__name__}: {' '.join(str(error).split())}") from error
    return cls(**settings)


def _on_meta(cls: type[Backbone]) -> Backbone:
    """Return a backbone without memory for its weights, or on the CPU if its constructor needs their values."""
    try:
        with torch.device("meta"):
            return make(cls, [])
    except NotImplementedError:  # "Cannot copy out of meta tensor"
        return make(cls, [])


def _list() -> int:
    loaded = plugins()
    packages = {plugin.backbone: plugin.package for plugin in loaded if plugin.backbone}
    own = f"spar-lightning {version('spar-lightning')}"
    rows = [("name", "class", "package", "window", "patch", "dimension", "status")]
    for cls in subclasses(Backbone):
        rows.append((cls.__name__, class_path(cls), packages.get(cls, own), *_facts(cls)))
    for plugin in loaded:
        if plugin.error is not None:
            rows.append((plugin.name, plugin.path, plugin.package, "-", "-", "-", f"broken: {plugin.reason}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _facts(cls: type[Backbone]) -> tuple[str, str, str, str]:
    try:
        backbone = _on_meta(cls)
    except Exception as error:  # the constructor of a plugin may raise anything
        return "-", "-", "-", printable(f"cannot be built without arguments: {error}")
    return str(backbone.window), str(backbone.patch_size), str(backbone.embed_dim), "ok"


def _show(cls: type[Backbone], arguments: Sequence[str]) -> int:
    backbone = make(cls, arguments) if arguments else _on_meta(cls)  # arguments can name weights
    print(f"{cls.__name__} ({class_path(cls)})")
    print(f"window {backbone.window} px, patch {backbone.patch_size} px, dimension {backbone.embed_dim}")
    packs, windows = ("" if able else "no " for able in (backbone.packs, backbone.windowable))
    print(f"mean {backbone.mean}, std {backbone.std}, {packs}sequence packing, {windows}windowed attention\n")
    groups = backbone.parameter_groups()
    for name, members in groups.items():
        print(f"{name:<16} {sum(p.numel() for p in members) / 1e6:8.2f} M")
    grouped = {id(p) for members in groups.values() for p in members}
    unused = [p for p in backbone.parameters() if id(p) not in grouped]
    total = sum(p.numel() for p in backbone.parameters())
    print(f"{'(never trained)':<16} {sum(p.numel() for p in unused) / 1e6:8.2f} M  in no group")
    print(f"{'all':<16} {total / 1e6:8.2f} M")
    return 0


def _function(path: str) -> Any:
    """Return a function by its path.

    Raises:
        UserError: The function cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--reference {path}: cannot be imported ({error}). Pass the path of a function, such as my_vit.reference."
        ) from error


def _check(cls: type[Backbone], arguments: Sequence[str], reference: Reference | None, as_json: bool) -> int:
    results: list[dict[str, str | None]] = []
    first: dict[str, str] = {}  # name of the first check with an error, by its type and place
    backbone = make(cls, arguments)  # built once: that takes longer than the checks
    for check in backbone_checks(lambda: copy.deepcopy(backbone), reference):
        status, message, place = "passed", None, None
        try:
            check()
        except SkipTest as reason:
            status, message = "skipped", str(reason)
        except Exception as error:  # a broken backbone may raise anything
            status, message, place = "FAILED", f"{type(error).__name__}: {error}", check.place(error)
        results.append({"check": check.name, "status": status.lower(), "message": message, "place": place})
        if not as_json:
            same = check.name
            if message is not None and status == "FAILED" and not message.startswith("AssertionError"):
                same = first.setdefault(f"{message.partition(':')[0]} {place}", check.name)
            text = message if same == check.name else f"the same error as {same}"
            print(f"{status:<7} {check}{f': {text}' if text else ''}", flush=True)
            if place and same == check.name:
                print(f"        {place}", flush=True)
    if as_json:
        print(json.dumps(results, indent=2))
    failed = sum(result["status"] == "failed" for result in results)
    if failed:
        print(f"{failed} checks failed: {cls.__name__} does not implement the backbone interface.", file=sys.stderr)
    return 1 if failed else 0
