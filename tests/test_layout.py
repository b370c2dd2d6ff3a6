"""The plan of the house: links at the top, imports downward, no reach into Lightning's private parts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spar_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first; a module imports from its own row and from those above it in this list.
LAYERS = [
    ["errors", "markdown", "pyplot", "configs"],
    ["sliding_window", "trainable", "packing", "zero_shot", "geometry", "processes", "label_map"],
    ["backbones", "datamodules", "pictures"],
    ["pixels", "student_weights", "refine"],
    ["cosine_maps", "text_embeddings"],
    ["segmenter"],
    ["evaluation"],
    ["distillation"],
    ["loading"],
    ["export", "callbacks", "testing", "speed"],
    ["cli"],
    ["__main__"],
]


def room(module: str) -> str:
    return module.removeprefix("spar_lightning").removeprefix(".").split(".")[0]


def imported(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    froms = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return froms + [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    allowed = {"", here}
    for layer in LAYERS:
        if here in layer:
            break
        allowed.update(layer)
    for module in imported(path):
        if module.split(".")[0] == "spar_lightning":
            assert room(module) in allowed, f"{path.name} imports {module}"


@pytest.mark.parametrize("name", ["backbones", "callbacks", "configs", "datamodules"])
def test_links_at_the_top(name: str) -> None:
    assert (ROOT / name).is_symlink() and (ROOT / name).resolve() == PACKAGE / name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_parts_of_libraries(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for module in imported(path):
        assert not any(part.startswith("_") for part in module.split(".")), module
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # Lightning: reading it breaks the resume of a loader in the middle of an epoch, without a word.
    assert "estimated_stepping_batches" not in attributes
    # Lightning: its hyperparameters come back over the user's command line on resume.
    assert "save_hyperparameters" not in attributes
