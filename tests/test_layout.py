"""Tests of the code layout: order of imports, import cycles, use of higher layers, private names of libraries."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spar_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first, as in docs/code_layout.md: a module may import from its own folder and from names before it.
ORDER = [
    *("errors", "formatting", "distributed", "stopping", "configs", "files", "image", "backbones"),
    *("sliding_window", "testing", "refinement", "segmentation", "datasets", "feature_cache", "visualization"),
    *(
        "evaluation",
        "probes",
        "datamodules",
        "cosine_decay",
        "random_scale",
        "losses",
        "distillation",
        "header",
        "student",
        "feature_index",
        "callbacks",
        "export",
        "speed",
        "demo",
        "cli",
        "__main__",
    ),
]


def name(path: Path) -> str:
    """Return the dotted name of a module; for __init__.py, the name of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name(path): path for path in MODULES}


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of every import in a file, including nested ones; the name is empty for `import x`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports."""
    found = set()
    for module, attribute in imported(path):
        if module.split(".")[0] == "spar_lightning":
            found.add(f"{module}.{attribute}" if f"{module}.{attribute}" in NAMES else module)
    return found - {name(path)}


def test_imports_run_downward() -> None:
    offenders = []
    for path in MODULES:
        here = [*name(path).split("."), ""][1]
        if not here:  # the package itself; its only import is lazy
            continue
        for module in own_imports(path):
            there = [*module.split("."), ""][1]
            if there and there != here and ORDER.index(there) > ORDER.index(here):
                offenders.append(f"{name(path)} -> {module}")
    assert not offenders


def test_the_order_is_that_of_the_page() -> None:
    page = (ROOT / "docs" / "code_layout.md").read_text()
    places = [page.index(f"\n  {part}") for part in ORDER[:-1]]
    assert places == sorted(places)
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(ORDER)


def test_no_cycles() -> None:
    graph = {module: own_imports(path) for module, path in NAMES.items()}
    graph = {
        m: {n for n in targets if n not in m.split(".") and not m.startswith(f"{n}.")} for m, targets in graph.items()
    }
    done: set[str] = set()
    while free := [module for module in graph if module not in done and graph[module] <= done | {"spar_lightning"}]:
        done.update(free)
    assert sorted(set(graph) - done) == []


HIGHER = ("module", "model", "datamodule", "teacher", "backbone", "student", "trainer")


def test_no_way_around_the_order() -> None:
    """Check that objects of a higher layer (`trainer.datamodule`, a module, a model) are not passed down as Any."""
    offenders = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                untyped = isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any"
                if untyped and argument.arg in HIGHER:
                    offenders.append(f"{name(path)}.{node.name}({argument.arg}: Any)")
            reads = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            checked = {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            if reads & {"datamodule", "lightning_module"} and "isinstance" not in checked and "cli" not in path.parts:
                offenders.append(f"{name(path)}.{node.name} reads a higher layer without isinstance")
    assert not offenders


@pytest.mark.parametrize("link", ["backbones", "callbacks", "configs", "datamodules"])
def test_links_at_the_top(link: str) -> None:
    assert (ROOT / link).is_symlink() and (ROOT / link).resolve() == PACKAGE / link


PRIVATE_ALLOWED = {("open_clip.model", "_build_vision_tower")}  # open_clip has no public function for a single tower
FORBIDDEN = {
    "estimated_stepping_batches": "reading it silently breaks the resume of a loader in the middle of an epoch",
    "save_hyperparameters": "on resume, LightningCLI would override the user's command line with them",
}


def private_parts(path: Path) -> list[str]:
    """Return the private names of other packages and the forbidden attributes of Lightning that a file uses."""
    found = [
        f"{module} {attribute}"
        for module, attribute in imported(path)
        if any(part.startswith("_") and not part.startswith("__") for part in [*module.split("."), attribute])
        and (module, attribute) not in PRIVATE_ALLOWED
    ]
    attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    return [*found, *sorted(attributes & FORBIDDEN.keys())]


def test_no_private_parts_of_libraries() -> None:
    assert {name(path): found for path in MODULES if (found := private_parts(path))} == {}


def test_a_private_name_of_a_public_module_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("from timm.layers import _hidden\nfrom __future__ import annotations\n")
    assert private_parts(tmp_path / "x.py") == ["timm.layers _hidden"]


def test_files_have_a_size_that_one_reads() -> None:
    assert [path.name for path in MODULES if len(path.read_text().splitlines()) > 400] == []
