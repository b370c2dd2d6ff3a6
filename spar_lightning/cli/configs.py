"""`spar configs`: list the configurations that ship, show one, copy it to start one's own."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from spar_lightning.configs import shipped
from spar_lightning.errors import UserError, nearest


def run(args: Sequence[str]) -> int:
    """List, show or copy."""
    parser = ArgumentParser("spar configs", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="shows this one")
    parser.add_argument("--copy", type=Path, metavar="FILE", help="write it to a file of your own")
    given = parser.parse_args(args)
    if given.name is None:
        if given.copy:
            raise UserError("--copy needs to know which: spar configs NAME --copy my.yaml. `spar configs` lists them.")
        width = max(map(len, shipped()))
        for name, path in shipped().items():
            print(f"{name:<{width}}  {_summary(path)}")
        return 0
    if given.name not in shipped():
        raise UserError(
            f"No configuration is called {given.name!r}. {nearest(given.name, shipped())}There are "
            f"{', '.join(shipped())}."
        )
    text = shipped()[given.name].read_text(encoding="utf-8")
    if given.copy is None:
        print(text, end="")
        return 0
    if given.copy.exists():
        raise UserError(f"--copy {given.copy}: there is such a file already. Give another name.")
    if not given.copy.absolute().parent.is_dir():
        raise UserError(f"--copy {given.copy}: there is no such folder. Make it, or give another name.")
    given.copy.write_text(text, encoding="utf-8")
    print(f"{given.copy}: now spar fit --config {given.copy}")
    return 0


def _summary(path: Path) -> str:
    """The file's first sentence."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines).split(". ")[0].rstrip(".")
