"""Every command and every snippet of README and docs runs, in small.

The commands are taken from the pages as they stand. What they name is there in small: the quickstart with two scenes
for `Tiny`, the other configurations with a CLIP of two blocks that reads any word, runs, a cache, six benchmarks,
photographs. What differs is said in `adapted`.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from spar_lightning import configs
from spar_lightning.cli import COMMANDS, main
from spar_lightning.datasets.scene_renderer import render
from tests.conftest import ROOT
from tests.export.conftest import in_process as in_process

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Patterns of lines that other tests run: those of other programs, and those that take minutes even in small.
ELSEWHERE = {
    r"pip install -e \.( && spar fit --config quickstart)?$": (".ci/run", "pip install -e"),
    r'pip install -e "\.\[test\]" && pytest$': (".ci/run", "test_command"),
    r"sbatch examples/slurm/(fit|cache)\.sbatch ": ("tests/cli/test_nodes.py", '"cache.sbatch", "fit.sbatch"'),
    r"torchrun ": ("tests/cli/test_nodes.py", '"torch.distributed.run", "--nnodes", "2"'),
    r"spar evaluate --prepare context ": ("tests/cli/conftest.py", '"evaluate", "--prepare", "context"'),
    r"spar evaluate .* --upsampler anyup": ("tests/cli/test_evaluate_sweep.py", '([], None, "anyup")'),
    r"spar speed all ": ("tests/cli/test_speed.py", '"speed", "all"'),
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


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
    """What the pages talk of."""
    world = tmp_path_factory.mktemp("world")
    (world / "shipped").mkdir()
    (world / "photos").mkdir()
    for i in range(2):
        scene = Image.fromarray(render(seed=4, index=i, height=72, width=96).image)
        scene.save(world / "photos" / f"{i}.jpg", quality=95)
    shutil.copy(world / "photos" / "0.jpg", world / "photo.jpg")
    (world / "classes.txt").write_text("disc\nring\nbackground: plain, grain\n")
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
    return copy


def adapted(command: str) -> list[str]:
    """Arguments of `spar`: paths of this world, one process, few repetitions, an existing run replaced."""
    args = shlex.split(command.replace("/data/benchmarks", "benchmarks"), comments=True)[1:]
    for name in ("--trainer.devices", "--trainer.strategy"):
        if name in args:
            args[args.index(name) + 1] = {"--trainer.devices": "1", "--trainer.strategy": "auto"}[name]
    if args[0] == "fit" and "--resume" not in args and "--print_config" not in args:
        args.append("--overwrite")
    if args[0] == "speed":
        args += ["--repeats", "1", "--height", "64", "--width", "64"]
        args = [{"9": "1", "bf16-mixed": "32-true"}.get(arg, arg) for arg in args]
    if args[0] == "evaluate" and {"--strides", "--sweep"} & set(args):
        args += ["--warm_ups", "0", "--repeats", "1"]
        args = ["64,32" if re.fullmatch(r"[\d,]{9,}", arg) else {"all": "voc20"}.get(arg, arg) for arg in args]
    return args


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run(page: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page):
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


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "index.md"], ids=lambda page: page.stem)
def test_snippets_run(page: Path, world: Path) -> None:
    (code,) = blocks(page, "python")
    space: dict[str, object] = {}
    exec(code, space)
    shapes = {name: tuple(space[name].shape) for name in ("labels", "scores", "features")}  # type: ignore[attr-defined]
    assert shapes == {"labels": (72, 96), "scores": (3, 72, 96), "features": (9, 12, 128)}


def test_every_page_and_every_command_has_its_place() -> None:
    pages = (ROOT / "mkdocs.yml").read_text()
    assert all(f"{page.name}\n" in pages for page in PAGES[1:])
    commands = re.findall(r"^## (\w+)$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    assert sorted(commands) == sorted(COMMANDS)


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
