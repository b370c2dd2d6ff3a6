"""`spar configs`: list the bundled configurations, print one, or copy it to a new file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from spar_lightning.cli.help import CommandParser
from spar_lightning.cli.output import check_new_file
from spar_lightning.configs import bundled_names, shipped
from spar_lightning.errors import UserError, nearest


def run(args: Sequence[str]) -> int:
    """List the configurations, print one, or copy it."""
    parser = CommandParser(
        "spar configs",
        "List the bundled configurations, print one, or copy it to a new file.",
        ("spar configs", "spar configs quickstart"),
        "[NAME [--copy FILE]]",
    )
    parser.add_argument("name", nargs="?", help="Configuration to print; without a name, all are listed")
    parser.add_argument("--copy", type=Path, metavar="FILE", help="Write the configuration to this new file")
    given = parser.parse_args(args)
    if given.name is None:
        if given.copy:
            raise UserError("--copy needs a name: spar configs NAME --copy my.yaml. `spar configs` lists the names.")
        _list(shipped())
        return 0
    if given.name not in shipped():
        raise UserError(
            f"No configuration is called {given.name!r}. {nearest(given.name, shipped())}Allowed: {bundled_names()}."
        )
    text = shipped()[given.name].read_text(encoding="utf-8")
    if given.copy is None:
        print(text, end="")
        return 0
    check_new_file("--copy", given.copy)
    with given.copy.open("x", encoding="utf-8") as file:
        file.write(text)
    print(f"Wrote {given.copy}. Next: spar fit --config {given.copy}")
    return 0


TABLES: Final = {
    "table2": "Table 2 of the paper: what is trained",
    "table3": "Table 3 of the paper: training images",
    "table9": "Table 9 of the paper: other ways of distillation",
}


def _list(files: dict[str, Path]) -> None:
    """Print the configurations by table; those of models come first."""
    width = max(map(len, files))
    before = ""
    for name, path in files.items():
        table = TABLES.get(name.partition("_")[0], "")
        if table != before:
            print(f"\n{table} (SigLIP2 ViT-B/16)")
        before = table
        print(f"{name:<{width}}  {_summary(path)}")


def _summary(path: Path) -> str:
    """Return the first sentence of the comment at the top of a configuration."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines).split(". ")[0].rstrip(".")
