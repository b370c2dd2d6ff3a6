"""Tests of reading class files in the formats of several projects, and of names that several classes share."""

import json
from pathlib import Path
from typing import Any

import pytest

from spar_lightning.errors import UserError
from spar_lightning.segmentation.class_file import read_class_file

EXPECTED = {"sky": ("sky", "wall"), "person": ("person",), "car": ("car", "auto")}


@pytest.mark.parametrize(
    "text",
    [
        "sky; wall\nperson\ncar; auto\n",
        "sky, wall\nperson\ncar, auto",
        "sky,wall\n\nperson\n car ,auto ,\n",
        "\ufeffsky: sky, wall\r\nperson\r\ncar; auto\r\n",
    ],
)
def test_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cls_mine.txt"
    path.write_text(text, encoding="utf-8", newline="")
    found = read_class_file(path)
    assert found == EXPECTED and list(found) == list(EXPECTED)


@pytest.mark.parametrize(
    "content",
    [
        ["sky, wall", "person", "car, auto"],
        [["sky", "wall"], ["person"], ["car", "auto"]],
        EXPECTED,
        {"sky": "sky, wall", "person": "person", "car": "car; auto"},
        {"categories": [{"id": 7, "name": "sky, wall"}, {"id": 3, "name": "person"}, {"id": 1, "name": "car, auto"}]},
        [
            {"name": "car, auto", "id": 1, "trainId": 2},
            {"name": "sky, wall", "id": 2, "trainId": 0},
            {"name": "person", "id": 3, "trainId": 1},
        ],
    ],
)
def test_json(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    found = read_class_file(path)
    assert found == EXPECTED and list(found) == list(EXPECTED)


def test_shared_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A name belongs to the class that it names first; if it is the first of several, to that with the fewest names."""
    path = tmp_path / "cls.txt"
    path.write_text("ottoman, stool\nstool\npot, flowerpot\npot\nbed, bunk, berth\nsky, bed\n")
    found = read_class_file(path)
    names = ["ottoman", "stool", "flowerpot", "pot", "bed bunk berth", "sky"]
    assert [*found.values()] == [tuple(each.split()) for each in names]
    assert "3 names that several classes have are kept by one of them (bed, pot, stool)" in caplog.text
    path.write_text("pot, jar\njar\npot\npot, jar\n")
    with pytest.raises(UserError, match=r"number 1 \(pot, jar\) has no name of its own"):
        read_class_file(path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "\n \n", "contains no classes"),
        ("a.txt", "car\n,,\n", "class number 2 has no name"),
        ("a.txt", "car; bus, coach\n", "one line"),
        ("a.txt", "thing: car\nthing: bus\n", "same label"),
        ("a.csv", "car\n", "not a file of class names"),
        ("a.json", '[{"name": "car", "trainId": 0}, {"name": "plate", "trainId": -1}]', "from 0 to 1 without gaps"),
        ("a.json", '[{"name": "car", "trainId": 0}, {"name": "bus"}]', "from 0 to 1 without gaps"),
        ("a.json", "[1, 2]", "class number 1 has no name: 1"),
        ("a.json", '[{"id": 1}]', "class number 1 has no name"),
        ("a.json", '["car"', "not valid JSON"),
        ("a.json", "3", "list of classes"),
        ("a.json", "{}", "contains no classes"),
    ],
)
def test_invalid_files(name: str, content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_class_file(tmp_path / name)
    with pytest.raises(UserError, match="file not found"):
        read_class_file(tmp_path / "no.txt")
