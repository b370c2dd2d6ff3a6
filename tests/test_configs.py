"""Every YAML that ships parses with the parser of `spar fit`."""

from importlib import resources
from pathlib import Path

import pytest

from spar_lightning.cli import main

CONFIGS = sorted(
    str(file) for file in resources.files("spar_lightning.configs").iterdir() if file.name.endswith(".yaml")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: Path(path).stem)
def test_parses_with_full_class_paths(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", path, "--print_config"])
    assert exit.value.code == 0
    assert "run_dir: runs/" in capsys.readouterr().out
    # Short names break where a plugin brings a second class of the same name.
    for line in Path(path).read_text().splitlines():
        if "class_path:" in line:
            assert "." in line.split("class_path:")[1].split("#")[0]
