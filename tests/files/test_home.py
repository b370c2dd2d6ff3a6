"""Tests of `~` in paths: replaced by the home folder wherever a path can be given."""

import os
from argparse import Namespace
from typing import Any

import pytest

from spar_lightning.errors import UserError
from spar_lightning.files.home import expand_argument, expand_home


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/x", "/h/x"),
        ("~", "/h"),
        (["~/a", "b"], ["/h/a", "b"]),
        (("~/a",), ("/h/a",)),
        ({"a": {"~/key": "~/b"}}, {"a": {"~/key": "/h/b"}}),
        (Namespace(a=Namespace(b=["~/c"]), n=3), Namespace(a=Namespace(b=["/h/c"]), n=3)),
        ("~nobody-has-this-name/x", "~nobody-has-this-name/x"),
        *((same, same) for same in ("a/~/b", "./~", "~root", "x~", "", None, 3, True)),
    ],
)
def test_values(given: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert expand_home(given) == expected


def test_a_folder_of_another_user() -> None:
    assert expand_home("~root/x") == os.path.join(os.path.expanduser("~root"), "x") != "~root/x"


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        *(("~/x", "/h/x"), ("--out=~/x", "--out=/h/x"), ("-c=~/x", "-c=/h/x"), ("--a.b=~/x=~/y", "--a.b=/h/x=~/y")),
        *((same, same) for same in ("a=~/x", "--data.cache=~", "~", "--out")),  # "~" alone is null in YAML
    ],
)
def test_arguments(arg: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert expand_argument(arg) == expected


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="HOME"):
        expand_home("~/x")
    with pytest.raises(UserError, match="HOME"):
        expand_argument("--out=~/x")
