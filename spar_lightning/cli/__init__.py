"""The `spar` command: a table of commands. The module of a command is imported only when the command is run.

`spar --help` therefore starts as fast as Python itself. Errors that a user can fix are printed as one message with exit
code 2. All other errors keep their traceback, because they are bugs.
"""

import errno
import sys
from collections.abc import Sequence
from importlib import import_module

from spar_lightning import __version__
from spar_lightning.cli.help import stored_help
from spar_lightning.configs.renamed import COMMANDS as RENAMED
from spar_lightning.configs.renamed import check_options
from spar_lightning.errors import UserError, nearest, user_error

COMMANDS = {
    "fit": "Distill a student: teacher features first, then training and validation.",
    "cache": "Compute the teacher's features, on any number of processes; inspect and verify a cache.",
    "validate": "Measure the mIoU of a backbone or a trained student on the configuration's validation sets.",
    "evaluate": "Measure mIoU by the paper's protocol, also over strides and sizes; check benchmarks, compare results.",
    "predict": "Segment images: segmentation maps, overlays, scores, features, PCA pictures.",
    "export": "Write a student for open_clip, timm, transformers or ONNX, checked by that library.",
    "speed": "Measure the speed of teacher, training, segmentation and reading against the published procedure.",
    "doctor": "Check packages, devices, plugins, disk; take two steps of a configuration.",
    "configs": "List the bundled configurations, show one, copy it.",
    "backbones": "List backbones and plugins, show the parts of one, run the interface checks.",
}

# System errors that a user can fix by choosing another location.
OF_PLACES = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR),
)

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
    """Run a command and return its exit code: 0 done, 1 done except for listed items, 2 user error, 130 Ctrl-C."""
    given = list(sys.argv[1:] if args is None else args)
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
    try:
        check_options(command, given[1:])
        code: int = import_module(f"spar_lightning.cli.{command}").run(given[1:])
    except ValueError as error:
        if cause := user_error(error):
            return _fail(f"spar {command}", _sentence(cause))
        if sentence := _of_union(error):
            return _fail(f"spar {command}", sentence)
        raise
    except (ImportError, RuntimeError) as error:
        if "torchvision" not in str(error):
            raise
        return _fail(f"spar {command}", f"torchvision does not work ({error}). Run spar doctor to see the fix.")
    except OSError as error:
        if error.errno not in OF_PLACES:
            raise
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(
            f"spar {command}",
            f"cannot write {where}. Free some space, or pass another run_dir, data.root, data.cache or --out.",
        )
    except KeyboardInterrupt:
        return 130
    return code


def _of_union(error: ValueError) -> str | None:
    """Return the error that one of our classes raised, if jsonargparse lists it among errors of other types."""
    union = "Does not validate against any of the Union subtypes"
    lines = [line.strip() for line in str(error).splitlines()]
    said = (line.removeprefix("- ") for line in lines if line.startswith("- "))
    return next((line for line in said if not line.startswith(("Expected a", union))), None) if union in lines else None


def _sentence(error: UserError) -> str:
    """Return the message of an error, without the traceback that a loader process adds."""
    text = str(error)
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip() if "Original Traceback" in text else text


def _fail(command: str, sentence: str) -> int:
    print(f"{command}: error: {sentence}", file=sys.stderr)
    return 2
