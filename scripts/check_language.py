"""Find wording that docs/contributing.md rules out, in docstrings, comments, messages and pages; exit 1 if any is left.

    python scripts/check_language.py [FILE ...]     # without files: everything that git tracks

Code is not checked: names, keys and format fields keep their spelling. Neither are quotations of other projects' files.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Wording, and what the field says instead.
RULES = {
    r"\b(is|are|was|were) (no|none)\b(?! longer| more)": "is not a, no such, found no",
    r"\b(lie|lies|lay|lain)\b": "is in, is stored in",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"\bdear(er|est)?\b": "expensive",
    r"\bceased?\b": "stop, fail",
    r"\bbeside\b": "next to",
    r"\bby turns\b": "alternately, interleaved",
    r"\b(go|goes|going|went|gone) on\b": "continue",
    r"\brefus(e|es|ed|ing|al|als)\b": "reject, raise",
    r"\b(quarantined?|set aside)\b": "skipped",
    r"\bkeeps? the contract\b": "implements the interface",
    r"\bposition table\b": "positional embedding",
    r"(?<!ground )(?<!ground-)\btruths?\b": "ground truth",
    r"(?<!sines and )\bcosines\b": "similarities",
    r"\b(colour|behaviour|neighbour|favour|grey|centre|metre|artefact|analyse|licence)(s|d|ed|ing|less)?\b": "American",
    r"\b(normal|token|optim|general|initial|visual|recogn|quant|regular|serial)is(e|es|ed|er|ing|ation)\b": "-ize",
    r"\bdistils?\b|\b(label|cancel|model|travel)l(ed|ing)\b": "American: distill, labeled",
}
# Rules for the beginning of a docstring, and of a sentence in it or in the help of an option.
OPENER = r"(What|Who|Whose|Where|Whether|Which)\b"
SENTENCE = r"(?:^|[.:]\s+)Of\b(?! course)"

EXEMPT = ("LICENSE", "scripts/check_language.py", "tests/data/", "spar_lightning/configs/templates/")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each docstring, comment and message of a Python file, or of each line of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        fence = False
        for number, line in enumerate(text.splitlines(), 1):
            fence ^= line.lstrip().startswith("```")
            comment = re.search(r"#\s.*", line)
            code = fence or path.suffix in (".yaml", ".toml", ".cfg", ".sbatch")
            yield number, (comment[0] if comment else "") if code else re.sub(r"`[^`]*`", "`", line)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for offset, line in enumerate(re.sub(r"`[^`\n]*`", "`", node.value).split("\n")):
                yield node.lineno + offset, line


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each docstring of a Python file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                yield first.lineno, ast.get_docstring(node) or ""


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, wording and what to write instead."""
    for number, text in prose(path):
        for rule, instead in RULES.items():
            yield from ((number, match[0], instead) for match in re.finditer(rule, text, re.IGNORECASE))
    if path.suffix == ".py":
        for number, text in docstrings(path):
            if match := re.match(OPENER, text):
                yield number, match[0], "a verb in the imperative, or a noun phrase"
            for match in re.finditer(SENTENCE, re.sub(r"\n\s*", "\n", text), re.MULTILINE):
                yield number, match[0].strip(), "name the noun before 'of'"
        for number, text in prose(path):
            if re.match("Of ", text):
                yield number, "Of", "name the noun before 'of'"


def main(arguments: list[str]) -> int:
    suffixes = (".py", ".md", ".yaml", ".toml", ".cfg", ".ipynb", ".sbatch")
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    paths = arguments or [path for path in tracked if path.endswith(suffixes) and not path.startswith(EXEMPT)]
    counts: Counter[str] = Counter()
    for path in paths:
        for number, wording, instead in sorted(findings(Path(path))):
            print(f"{path}:{number}: {wording!r}: write {instead}")
            counts[instead] += 1
    print(f"{sum(counts.values())} findings in {len(paths)} files")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
