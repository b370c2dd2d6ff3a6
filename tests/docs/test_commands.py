"""Every command and Python block of README and docs runs, at small scale.

The commands are taken from the pages as they are. The files that they name exist in a small version: the quickstart
with two images for `Tiny`, the other configurations with a CLIP of two blocks that reads any word, runs, a cache, six
benchmarks, photographs. `adapted` lists the differences. tests/docs/test_reader.py runs the first pages unchanged.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from PIL import Image

from spar_lightning import configs
from spar_lightning.cli import COMMANDS, main
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.export import safetensors
from spar_lightning.student import load_student
from tests.cli.test_help import examples
from tests.conftest import ROOT
from tests.docs.pages import PAGES, blocks, commands
from tests.export.conftest import in_process as in_process

# Pages with files that a reader writes; tests/docs/test_reader.py runs them as they are.
TUTORIALS = [page for page in PAGES if page.parent.name == "tutorials"]
# Patterns of lines that are run elsewhere: those of other programs, and those that take minutes even at small scale.
ELSEWHERE = {
    r'pip install -e "\.\[(demo|large)\]"$': ("pyproject.toml", "spar-lightning[demo,large,"),
    r"spar demo": ("tests/demo/test_page.py", 'main(["demo"])'),
    r"pip install -e \.( && spar fit --config quickstart)?$": (".ci/run", "pip install -e"),
    r'pip install -e "\.\[test\]" && pytest$': (".ci/run", "test_command"),
    r'pip install -e "\.\[dev,docs,test\]"$': (".ci/run", 'pip install -q -e ".[dev,docs]"'),
    r"pytest( -m slow)? +#": (".ci/run", "pytest -m slow"),
    r"ruff check \. && ruff format --check \.$": (".ci/run", "ruff check .\nruff format --check ."),
    r"mypy$": (".ci/run", "\nmypy\n"),
    r"python scripts/check_language\.py$": (".ci/run", "python scripts/check_language.py"),
    r"mkdocs build --strict --site-dir site$": (".ci/run", "mkdocs build --strict"),
    r"python scripts/check_pages\.py site +#": (".ci/run", "python scripts/check_pages.py"),
    r"export OMP_NUM_THREADS=1$": ("docs/howto/cpu.md", "OMP_NUM_THREADS"),
    r"sbatch examples/slurm/cache\.sbatch ": ("tests/cli/test_nodes.py", 'Job("cache.sbatch"'),
    r"sbatch examples/slurm/fit\.sbatch ": ("tests/cli/test_nodes.py", 'Job("fit.sbatch"'),
    r"torchrun ": ("tests/cli/test_nodes.py", '"torch.distributed.run", "--nnodes", "2"'),
    r"spar evaluate --prepare context ": ("tests/cli/conftest.py", '"evaluate", "--prepare", what'),
    r"spar evaluate .* --upsampler anyup": ("tests/cli/test_evaluate_sweep.py", '([], None, "anyup")'),
    r"(ROWS=\S+ )?scripts/reproduce_paper\.sh ": ("tests/evaluation/test_paper_table.py", "reproduce_paper.sh"),
    r"spar evaluate --check_paper results$": ("tests/evaluation/test_paper_table.py", '"--check_paper"'),
    r"spar speed all ": ("tests/cli/test_speed.py", '"speed", "all"'),
    r"python -m scripts\.file_catalogue( --group images)? +#": (
        "tests/catalogue/test_catalogue.py",
        "scripts.file_catalogue",
    ),
    r"spar backbones check SigLIP2 ": ("tests/testing/test_checks.py", "SigLIP2"),
}
# Weights or packages that are not available here: these commands are only parsed.
PARSED = ("WandbLogger", "--model.backbone NaFlex")


def config(backbone: dict[str, object], data: dict[str, object], run: str, **model: object) -> str:
    """A configuration of two steps."""
    content = {
        "run_dir": run, "seed_everything": 0, "data": data,
        "model": {"backbone": backbone, "templates": ["{}"], "lr": 1e-3, **model},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1},
    }  # fmt: skip
    return yaml.safe_dump(content)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory, trees: Path, clip: str) -> Path:
    """Return a folder with the files that the pages name."""
    world = tmp_path_factory.mktemp("world")
    (world / "shipped").mkdir()
    (world / "photos").mkdir()
    for i in range(2):
        scene = Image.fromarray(render(seed=4, index=i, height=72, width=96).image)
        scene.save(world / "photos" / f"{i}.jpg", quality=95)
    shutil.copy(world / "photos" / "0.jpg", world / "photo.jpg")
    (world / "classes.txt").write_text("red dot\nblue dot\nbackground: plain, grain\n")
    scenes = {"root": "data/scenes", "train_scenes": 2, "val_scenes": 1}
    scenes_data: dict[str, object] = {"class_path": "spar_lightning.datamodules.RenderedScenes", "init_args": scenes}
    quick = config({"class_path": "spar_lightning.backbones.Tiny"}, scenes_data, "runs/quickstart", stride=64)
    for name in configs.shipped():
        images = {
            "shards": "photos",
            "cache": f"data/cache/{name}",
            "augmentation": {"scale": [96, 96], "min_side": 64, "multiple": 16},
        }
        data: dict[str, object] = {"class_path": "spar_lightning.datamodules.SA1B", "init_args": images}
        network: dict[str, object] = {"class_path": "tests.any_words.SmallCLIP", "init_args": {"pretrained": clip}}
        text = config(network, data, f"runs/{name}", stride=64)
        (world / "shipped" / f"{name}.yaml").write_text(quick if name == "quickstart" else text)
    (world / "benchmarks").symlink_to(trees)
    return world


@pytest.fixture(scope="module")
def finished(small_world: Path) -> Path:
    """The same after two runs, and with results to compare."""
    with pytest.MonkeyPatch.context() as patch:
        enter(small_world, patch)
        for name in ("quickstart", "siglip2_vitb16"):
            assert main(["fit", "--config", name]) == 0
        shutil.copytree("runs/siglip2_vitb16", "runs/mine")
        scenes = "data/scenes/seed-0/scenes_192/images"
        assert main(["index", scenes, "--weights", "runs/quickstart", "--out", "runs/index"]) == 0
        for name in "AB":
            where = ["--benchmarks", "voc20", "--root", "benchmarks"]
            assert main(["evaluate", "--weights", "runs/mine", *where, "--out", f"runs/evaluate/{name}"]) == 0
            assert main(["evaluate", "--config", "siglip2_vitb16", *where, "--strides", "64", "--warm_ups", "0",
                         "--repeats", "1", "--out", f"runs/sweeps/{name}"]) == 0  # fmt: skip
    return small_world


def enter(world: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(world)
    patch.setenv("SPAR_CACHE", str(world / "text"))
    names = {path.stem: path for path in sorted((world / "shipped").glob("*.yaml"))}
    patch.setattr(configs, "shipped", lambda: names)
    for module in ("configs", "parser"):
        patch.setattr(f"spar_lightning.cli.{module}.shipped", lambda: names)


@pytest.fixture
def world(finished: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy that one page may change; exports are checked in this process."""
    copy = tmp_path / "world"
    shutil.copytree(finished, copy, symlinks=True)
    enter(copy, monkeypatch)

    def download(name: str, files: Sequence[str]) -> Path:
        folder = copy / "hub"
        if not folder.exists():
            folder.mkdir()
            safetensors.write(load_student("runs/siglip2_vitb16"), folder)
        return folder

    # tests/files/test_hub.py uses a server.
    monkeypatch.setattr("spar_lightning.files.hub.download", download)
    monkeypatch.setattr("spar_lightning.cli.export.upload", lambda name, folder, private: f"https://hub/{name}")
    return copy


def adapted(command: str) -> list[str]:
    """Return the arguments of a command at small scale: paths of this world, one process, few images and repeats."""
    args = shlex.split(command.replace("/data/benchmarks", "benchmarks"), comments=True)[1:]
    small = {"--trainer.devices": "1", "--trainer.strategy": "auto", "--data.train_scenes": "2"}
    for name in small.keys() & set(args):
        args[args.index(name) + 1] = small[name]
    if any(part in command for part in PARSED):
        return [*args, "--print_config"]
    if args[0] == "fit" and "--resume" not in args and "--print_config" not in args:
        args.append("--overwrite")
    if args[0] == "probe":
        small = {
            "siglip2": "runs/siglip2_vitb16",
            "5000000": "1000",
            "512": "64",
            "512,640,800,1024": "64,96",
            "512,800": "64",
        }
        args = [small.get(arg, arg) for arg in args]
        args += ["--steps", "2", "--batch_size", "2"] if args[1] == "linear" and "--help" not in args else []
    if args[0] == "speed":
        args += ["--repeats", "1", "--height", "64", "--width", "64"]
        args = [{"9": "1", "bf16-mixed": "32-true"}.get(arg, arg) for arg in args]
    if args[0] == "evaluate" and {"--strides", "--sweep"} & set(args):
        args += ["--warm_ups", "0", "--repeats", "1"]
        args = ["64,32" if re.fullmatch(r"[\d,]{9,}", arg) else {"paper6": "voc20"}.get(arg, arg) for arg in args]
    return args


LISTS = {page.stem: commands(page) for page in PAGES if commands(page) and page not in TUTORIALS}
# The page about evaluation measures all benchmarks by the same commands.
LISTS["paper"] = [line.replace("--benchmarks paper6", "--benchmarks voc20") for line in LISTS["paper"]]


FAST = ("README", "getting_started", "methods")


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(lines, id=name, marks=[] if name in FAST else [pytest.mark.slow])
        for name, lines in {**LISTS, "help": examples()}.items()
    ],
)
def test_commands_run(lines: list[str], world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in lines:
        if other := next((place for pattern, place in ELSEWHERE.items() if re.match(pattern, command)), None):
            assert other[1] in (ROOT / other[0]).read_text()
            continue
        assert command.startswith("spar "), command
        args = adapted(command)
        try:
            code = main(args)
        except SystemExit as exit:
            code = int(exit.code or 0)
        shown = capsys.readouterr()
        expected = 1 if args[:2] == ["evaluate", "--check"] else 0
        assert code in (0, expected), f"{command}\n{shown.err}"


@pytest.mark.slow
def test_table_1_at_small_scale(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All rows of scripts/reproduce_paper.sh; AnyUp is left out, whose network has its full size."""
    students = dict.fromkeys(("SIGLIP2", "OPENCLIP", "DINOV3"), "runs/siglip2_vitb16")
    script = ["bash", str(ROOT / "scripts" / "reproduce_paper.sh"), "--dry-run", "benchmarks", "results"]
    commands = subprocess.run(
        [*script, "--max_images", "1", "--gallery", "1"], check=True, capture_output=True, text=True,
        env={**os.environ, **students},
    ).stdout.splitlines()  # fmt: skip
    assert len(commands) == 19
    for command in commands[:-1]:
        args = shlex.split(re.sub(r"--model\.backbone\S* \S+|--upsampler anyup", "", command))[1:]
        assert main(args) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(shlex.split(commands[-1])[1:]) == 1  # the benchmarks are not complete, so nothing is compared
    shown = capsys.readouterr().out
    assert shown.count("1 of 1449 images") == 2 * 18 and shown.count("family SmallCLIP instead of") == 18
    assert len(list((world / "results").glob("*/report.html"))) == 18


PYTHON = [
    (page, block.code)
    for page in PAGES
    if page not in TUTORIALS
    for block in blocks(page)
    if block.language == "python"
]


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[page.stem for page, _ in PYTHON])
def test_python_runs(page: Path, code: str, world: Path) -> None:
    space: dict[str, object] = {}
    exec(code, space)
    known = {"labels": (192, 192), "scores": (3, 192, 192), "features": (24, 24, 128)}
    for name in known.keys() & space.keys():
        assert tuple(space[name].shape) == known[name]  # type: ignore[attr-defined]


def test_configuration_blocks_are_valid() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml":
                assert isinstance(yaml.safe_load(block.code), dict), page
            if block.language == "python":
                ast.parse(block.code)


def test_other_blocks_contain_no_spar_commands() -> None:
    """Check that no command escapes the tests in a block of another language."""
    for page in PAGES:
        for block in blocks(page):
            if block.language not in ("bash", "python", "yaml", "text"):
                assert not re.search(r"^spar ", block.code, re.MULTILINE), page


def test_every_page_and_every_command_has_its_place() -> None:
    pages = (ROOT / "mkdocs.yml").read_text()
    assert all(str(page.relative_to(ROOT / "docs")) in pages for page in PAGES[1:])
    listed = re.findall(r"^## (\w+)$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
