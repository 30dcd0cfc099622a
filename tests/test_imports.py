"""The public names, and that optional packages stay optional."""

from __future__ import annotations

import subprocess
import sys

import pytest

import passes
import spa


@pytest.mark.parametrize("package", [spa, passes])
def test_every_public_name_is_there(package) -> None:
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None


@pytest.mark.parametrize("package", [spa, passes])
def test_public_names_are_sorted(package) -> None:
    """Constants, then classes, then functions, each by the alphabet: as ruff sorts them."""

    def place(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2), name

    assert list(package.__all__) == sorted(package.__all__, key=place)


def test_star_import_gives_the_public_names() -> None:
    scope: dict[str, object] = {}
    exec("from spa import *", scope)
    assert set(scope) - {"__builtins__"} == set(spa.__all__)


def test_no_optional_package_is_imported() -> None:
    code = "import sys, spa, spa.cli, passes; print(sorted({'torch', 'transformers', 'timm', 'onnxscript', 'models'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_version() -> None:
    assert spa.__version__.count(".") == 2
