"""Short help of every command, rendered from its parser.

`spar COMMAND --help` prints a stored copy of that text (help_texts/, written by scripts/write_help.py), because making
the parser imports Lightning, which takes seconds. `--model.help`, `--data.help CLASS` and `--trainer.help` are answered
by the parser itself.
"""

import textwrap
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from importlib.resources import files
from typing import Any, NoReturn, cast

WIDTH, COLUMN = 110, 34  # characters of a line, and where the text of an option begins
ALL = "*"
# Options of the libraries, in the words of this project.
TEXTS = {
    "-h, --help": ("-h, --help", "Show this help and exit."),
    "-c, --config": ("-c, --config CONFIG", "YAML file, or name of a bundled configuration (see spar configs)."),
    "--print_config": ("--print_config", "Print all keys with their values and exit."),
    "--seed_everything": ("--seed_everything", "Seed of torch, NumPy and Python; true draws one."),
}


class ShortHelp:
    """Mixin for argparse parsers: help with a line or two per option, in groups, followed by examples.

    Attributes:
        shown: Patterns of the option names that the help lists; the parser may accept more, for example all keys of a
            configuration file.
        titles: Titles of the groups by the first part of an option's name; "" is the group of options without a dot.
            Empty: a single group of all options, as for the settings of a class.
        notes: Paragraphs below a title.
        more: Paragraphs after the groups.
        examples: Commands, one per line.
        also: Parsers whose options are listed, too.
    """

    shown: Sequence[str] = ("*",)
    titles: Mapping[str, str] = {}
    notes: Mapping[str, Sequence[str]] = {}
    more: Sequence[str] = ()
    examples: Sequence[str] = ()
    also: Sequence["ShortHelp"] = ()
    usage_line = ""

    def format_help(self, *_: Any) -> str:
        """Return the help text, at most 110 columns wide."""
        parser = cast(ArgumentParser, self)
        prog = parser.prog.replace("spar [options]", "spar")
        description = parser.description or ""
        usage = [] if description.startswith("Help for --") else [f"usage: {prog} {self.usage_line or '[options]'}"]
        parts = [*usage, *_paragraphs(description)]  # jsonargparse makes a parser for the help of a class
        for group, title in (self.titles or {ALL: "options"}).items():
            if rows := self.rows(group, ["help", "config", "print_config", *self.shown]):
                notes = [textwrap.indent(textwrap.fill(note, WIDTH - 2), "  ") for note in self.notes.get(group, ())]
                parts.append("\n".join([f"{title}:", *notes, *rows]))
        parts += [textwrap.fill(text, WIDTH, subsequent_indent="  ") for text in self.more]
        if self.examples:
            parts.append("\n".join(["examples:", *(f"  {line}" for line in self.examples)]))
        return "\n\n".join(parts) + "\n"

    def rows(self, group: str, shown: Sequence[str]) -> list[str]:
        """Return the options of a group whose names match one of the patterns, formatted."""
        actions = [a for parser in (self, *self.also) for a in cast(ArgumentParser, parser)._actions]
        flags = {flag for action in actions for flag in action.option_strings}
        found = {}
        for action in actions:
            names = [flag for flag in action.option_strings if not flag.endswith("+")]
            name = names[-1].lstrip("-") if names else action.dest
            if action.help is SUPPRESS or name.endswith(".help") or _is_config_of_group(name, flags):
                continue
            own = name.partition(".")[0] if "." in name else ""
            if group in (own, ALL) and any(fnmatch(name, p) for p in shown):
                found[name] = _row(", ".join(names) or action.dest, action)
        return list(found.values())


class CommandParser(ShortHelp, ArgumentParser):
    """Parser of a command without a configuration: short help, errors of one sentence, exit code 2."""

    def __init__(self, prog: str, description: str, examples: Sequence[str], usage: str = "") -> None:
        super().__init__(prog, description=description, allow_abbrev=False)
        self.examples, self.usage_line = examples, usage

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}. See {self.prog} --help.\n")


class GroupHelp(Action):
    """Option such as `--trainer.help`: print all options of the group and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str = SUPPRESS, help: str | None = None) -> None:
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, help=help)

    def __call__(self, parser: ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        assert isinstance(parser, ShortHelp)
        print("\n".join(parser.rows(self.option_strings[0].strip("-").partition(".")[0], ("*",))))
        parser.exit()


def stored_help(command: str, args: Iterable[str] = ()) -> str:
    """Return the stored help of a command, or of its action (`spar cache verify`) where that has a help of its own."""
    texts = files("spar_lightning.cli") / "help_texts"
    first = next(iter(args), "")
    own = texts / f"{command}_{first}.txt"
    chosen = own if first.isidentifier() and own.is_file() else texts / f"{command}.txt"
    return chosen.read_text(encoding="utf-8")


def _is_config_of_group(name: str, flags: set[str]) -> bool:
    """Return whether the option is jsonargparse's `--model FILE`, which accompanies `--model.lr` and the like."""
    return any(flag.startswith(f"--{name}.") and not flag.endswith(".help") for flag in flags)


def _paragraphs(text: str) -> list[str]:
    return [textwrap.fill(" ".join(part.split()), WIDTH) for part in text.split("\n\n") if part.strip()]


def _row(name: str, action: Action) -> str:
    """Return name, text and default of an option, wrapped."""
    if isinstance(action.metavar, str) and action.option_strings and "|" not in action.metavar:
        name = f"{name} {action.metavar}"
    elif action.choices:
        name = f"{name} {{{','.join(map(str, action.choices))}}}"
    name, text = TEXTS.get(", ".join(action.option_strings), (name, " ".join((action.help or "").split())))
    text += "." if text[-1:].isalnum() or text.endswith((")", "'")) else ""
    if default := _default(action):
        text += f" (default: {default})"
    lines = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    head = f"  {name}"
    first = [f"{head:<{COLUMN}}{lines.pop(0)}"] if len(head) < COLUMN else [head]
    return "\n".join([*first, *(" " * COLUMN + line for line in lines)]).rstrip()


def _default(action: Action) -> str:
    """Return a default as one would type it, or an empty string if an option has no default."""
    value = action.default
    if value is None or value is SUPPRESS or action.nargs == 0:
        return ""
    if isinstance(value, dict):  # a class: {"class_path": "torch.nn.MSELoss"}
        return str(value.get("class_path", "")).rpartition(".")[2]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
