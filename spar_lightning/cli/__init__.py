"""The `spar` command: a table of commands. The module of a command is imported only when the command is run.

`spar --help` therefore starts as fast as Python itself. Errors that a user can fix are printed as one message with exit
code 2. All other errors keep their traceback, because they are bugs.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from spar_lightning import __version__
from spar_lightning.cli import output
from spar_lightning.cli.error_messages import explained
from spar_lightning.cli.help import stored_help
from spar_lightning.cli.processes import end_with_parent
from spar_lightning.cli.slurm import requeue
from spar_lightning.configs.renamed import COMMANDS as RENAMED
from spar_lightning.configs.renamed import check_options
from spar_lightning.errors import nearest
from spar_lightning.files.home import expand_argument
from spar_lightning.stopping import Stopped, signals

COMMANDS = {
    "fit": "Distill a student: teacher features first, then training and validation.",
    "cache": "Compute the teacher's features, on any number of processes; inspect and verify a cache.",
    "validate": "Measure the mIoU of a backbone or a trained student on the configuration's validation sets.",
    "evaluate": "Measure mIoU by the paper's protocol, also over strides and sizes; check benchmarks, compare results.",
    "probe": "Probe frozen features on labels: linear layer, nearest neighbors, panoptic quality of known masks.",
    "predict": "Segment images: segmentation maps, overlays, scores, features, PCA pictures.",
    "index": "Store the dense features of images, for spar query.",
    "query": "Find and segment any classes in stored features, without running the network.",
    "demo": "Serve a local page: drop an image, type words, compare the modes.",
    "export": "Write a student for open_clip, timm, transformers or ONNX, checked by that library.",
    "speed": "Measure the speed of teacher, training, segmentation and reading against the published procedure.",
    "doctor": "Check packages, devices, plugins, disk; take two steps of a configuration.",
    "configs": "List the bundled configurations, show one, copy it.",
    "backbones": "List backbones and plugins, show the parts of one, run the interface checks.",
}

USAGE = """usage: spar COMMAND [options]

{version}: vision transformers at any resolution, for open-vocabulary segmentation.

commands:
{commands}

options:
  -h, --help     Show this help; after a command, the help of the command.
  --version      Show the version.

examples:
  spar fit --config quickstart
  spar fit --help
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done, 1 done except for listed items, 2 user error, 130 stopped by Ctrl-C, 141 the reader of the output has ended,
    143 stopped by another signal.
    """
    output.accept_all_names()
    try:
        try:
            return _main(list(sys.argv[1:] if args is None else args))
        finally:
            output.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError) and output.is_closed():
            output.discard()
            return _end(output.CLOSED)
        sentence = explained(error)
        if sentence is None:
            raise
        return _end(_fail("spar", sentence))


def _main(given: Sequence[str]) -> int:
    """Answer an option of `spar` itself, or run a command."""
    if not given or given[0] in ("-h", "--help"):
        rows = "\n".join(f"  {command:<14} {text}" for command, text in COMMANDS.items())
        print(USAGE.format(version=f"spar_lightning {__version__}", commands=rows), end="")
        return 0
    if given[0] == "--version":
        print(__version__)
        return 0
    command = given[0]
    if command in COMMANDS and {"-h", "--help"} & set(given):
        print(stored_help(command, given[1:]), end="")
        return 0
    if command in RENAMED:
        return _fail("spar", f"spar {command} is now spar {RENAMED[command]}.")
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS)
        return _fail("spar", f"Unknown command {command!r}. {hint}Allowed: {', '.join(COMMANDS)}.")
    if "" not in sys.path:
        sys.path.append("")  # finds classes in the current folder; last, so that no file there hides a package
    # Without this, torch prints dozens of lines for each connection that breaks when a rank ends.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with signals:
            end_with_parent()
            return _run(command, given[1:])
    except Stopped as stopped:
        requeue(stopped.number)
        return _end(stopped.code)
    except KeyboardInterrupt:  # before the handlers were installed
        return 130


def _run(command: str, args: Sequence[str]) -> int:
    """Run a command; print the message of an error that a user can fix and return 2."""
    try:
        args = [expand_argument(arg) for arg in args]
        check_options(command, args)
        code: int = import_module(f"spar_lightning.cli.{command}").run(args)
    except SystemExit as exit:  # from the parser, or because rank 0 prints the message
        if not _has_ranks():
            raise
        code = int(exit.code or 0)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output.is_closed():
            raise
        sentence = explained(error)
        if sentence is None and not _has_ranks():
            raise
        if sentence is None:
            traceback.print_exc()
        code = 1 if sentence is None else _fail(f"spar {command}", sentence)
    return _end(code)


def _end(code: int) -> int:
    """Return the exit code, or end the process with it if Python would wait for ranks that are gone."""
    if code and _has_ranks():
        signals.end(code)
    return code


def _has_ranks() -> bool:
    """Return whether this process is connected to other ranks by collectives."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _fail(command: str, sentence: str) -> int:
    print(f"{command}: error: {sentence}", file=sys.stderr)
    return 2
