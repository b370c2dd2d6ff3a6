"""Write the stored help of every command (spar_lightning/cli/help_texts), as its parser renders it.

    python scripts/write_help.py

Run it after a change of options or of their texts; tests/cli/test_help.py compares both.
"""

import io
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path

import spar_lightning.cli
from spar_lightning.cli import COMMANDS

ACTIONS = {"cache": ("info", "verify"), "backbones": ("list", "show", "check"), "probe": ("linear", "knn", "panoptic")}
FOLDER = Path(spar_lightning.cli.__file__).parent / "help_texts"


def rendered(command: str, *action: str) -> str:
    """Return what the parser of a command prints for --help."""
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        import_module(f"spar_lightning.cli.{command}").run([*action, "--help"])
    return text.getvalue()


def texts() -> dict[str, str]:
    """Return the help texts of all commands and actions by file name."""
    found = {f"{command}.txt": rendered(command) for command in COMMANDS}
    for command, actions in ACTIONS.items():
        found |= {f"{command}_{action}.txt": rendered(command, action) for action in actions}
    return found


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.splitlines())} lines")
