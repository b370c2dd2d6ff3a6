"""`spar backbones`: what there is, what a backbone consists of, whether it keeps the contract.

Facts come from the class itself, made with random weights unless arguments say otherwise; without
arguments on the meta device, so that no memory is taken.
"""

import copy
import inspect
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib.metadata import version

import torch
from jsonargparse import ArgumentParser as ConfigParser

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.registry import find_backbone, plugins, subclasses
from spar_lightning.errors import UserError
from spar_lightning.testing import backbone_checks

EPILOG = """examples:
  spar backbones
  spar backbones show SigLIP2 --model ViT-L-16-SigLIP2-512
  spar backbones check mypackage.backbones.MyViT --depth 2
"""


def run(args: Sequence[str]) -> int:
    """List, show or check; arguments behind the name go to the class, weights are random unless given."""
    parser = ArgumentParser(
        "spar backbones", description=__doc__, epilog=EPILOG, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=["list", "show", "check"], default="list")
    parser.add_argument("name", nargs="?", help="short name or full path of a class")
    given, arguments = parser.parse_known_args(args)
    if given.action == "list":
        if given.name or arguments:
            raise UserError(f"spar backbones list takes nothing more, but got {given.name or arguments[0]}.")
        return _list()
    if given.name is None:
        raise UserError(
            f"Give the name of a backbone: spar backbones {given.action} NAME. `spar backbones` lists them."
        )
    cls = find_backbone(given.name)
    return _show(cls, arguments) if given.action == "show" else _check(cls, arguments)


def make(cls: type[Backbone], arguments: Sequence[str]) -> Backbone:
    """The backbone with random weights, unless the arguments say otherwise."""
    parser = ConfigParser(f"spar backbones ... {cls.__name__}", exit_on_error=False)
    parser.add_class_arguments(cls, as_positional=False)
    pretrained = inspect.signature(cls).parameters.get("pretrained")
    if pretrained and isinstance(pretrained.default, str):  # a name of weights; the contract: None makes random ones
        parser.set_defaults(pretrained=None)
    try:
        settings = parser.instantiate(parser.parse_args(list(arguments)))
    except Exception as error:  # jsonargparse's own, of several types
        raise UserError(f"{cls.__name__}: {' '.join(str(error).split())}") from error
    return cls(**settings)


def _list() -> int:
    loaded = plugins()
    packages = {plugin.backbone: plugin.package for plugin in loaded if plugin.backbone}
    own = f"spar-lightning {version('spar-lightning')}"
    rows = [("name", "class", "package", "window", "patch", "dimension", "status")]
    for cls in subclasses(Backbone):
        path = f"{cls.__module__}.{cls.__qualname__}"
        rows.append((cls.__name__, path, packages.get(cls, own), *_facts(cls)))
    for plugin in loaded:
        if plugin.error is not None:
            status = f"broken: {type(plugin.error).__name__}: {plugin.error}"
            rows.append((plugin.name, plugin.path, plugin.package, "-", "-", "-", status))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _facts(cls: type[Backbone]) -> tuple[str, str, str, str]:
    try:
        with torch.device("meta"):
            backbone = make(cls, [])
    except Exception as error:  # a plugin's constructor may ask for anything
        return "-", "-", "-", f"not made without arguments: {error}"
    return str(backbone.window), str(backbone.patch_size), str(backbone.embed_dim), "ok"


def _show(cls: type[Backbone], arguments: Sequence[str]) -> int:
    with torch.device("cpu" if arguments else "meta"):  # weights that are given cannot be loaded into nothing
        backbone = make(cls, arguments)
    print(f"{cls.__name__} ({cls.__module__}.{cls.__qualname__})")
    print(f"window {backbone.window} px, patch {backbone.patch_size} px, dimension {backbone.embed_dim}")
    print(f"mean {backbone.mean}, std {backbone.std}, {'packs' if backbone.packs else 'image by image'}\n")
    groups = backbone.parameter_groups()
    for name, members in groups.items():
        print(f"{name:<16} {sum(p.numel() for p in members) / 1e6:8.2f} M")
    grouped = {id(p) for members in groups.values() for p in members}
    unused = [p for p in backbone.parameters() if id(p) not in grouped]
    total = sum(p.numel() for p in backbone.parameters())
    print(f"{'(never trained)':<16} {sum(p.numel() for p in unused) / 1e6:8.2f} M  no part in dense features")
    print(f"{'all':<16} {total / 1e6:8.2f} M")
    return 0


def _check(cls: type[Backbone], arguments: Sequence[str]) -> int:
    failed, backbone = 0, make(cls, arguments)  # made once: that costs more than the checks
    for check in backbone_checks(lambda: copy.deepcopy(backbone)):
        try:
            check()
        except Exception as error:  # a broken backbone may raise anything
            failed += 1
            print(f"FAILED  {check}: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"passed  {check}", flush=True)
    if failed:
        print(f"{failed} checks failed: {cls.__name__} does not keep the contract of a backbone.", file=sys.stderr)
    return 1 if failed else 0
