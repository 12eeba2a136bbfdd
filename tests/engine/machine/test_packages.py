from __future__ import annotations

import sys
from types import ModuleType

import pytest

from qwencli.engine.machine.packages import package_version, require
from qwencli.errors import MissingDependencyError


def need(module):
    return require(module, "--mode fast", "pip install it", "use --mode slow")


def test_a_package_that_imports_is_fine():
    assert need("json").__name__ == "json"
    assert require("os.path", "--mode fast", "pip install it") is sys.modules["os.path"]


def test_versions_are_of_distributions():
    assert package_version("torch")
    assert package_version("no-such-package") is None


def test_a_missing_package_names_the_mode_the_install_and_the_way_round():
    with pytest.raises(MissingDependencyError) as found:
        need("no_such_thing")
    assert str(found.value) == "--mode fast: the package no-such-thing is not installed"
    assert found.value.hint == "pip install it, or use --mode slow"


@pytest.mark.parametrize("way", ["folder", "by hand"])
def test_what_has_only_a_packages_name_is_not_taken_for_it(tmp_path, monkeypatch, way):
    if way == "folder":
        (tmp_path / "named_thing").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, "named_thing", ModuleType("named_thing"))
    with pytest.raises(MissingDependencyError) as found:
        need("named_thing")
    assert "named-thing is not installed, only another of its name" in str(found.value)


@pytest.mark.parametrize(
    "error",
    [
        "ImportError('libx.so.1')",
        "OSError('libx.so.1\\nmore')",
        "ValueError('libx.so.1')",
        "AttributeError('libx.so.1')",
    ],
)
def test_a_broken_package_says_why_in_one_line(tmp_path, monkeypatch, error):
    (tmp_path / "broken_thing.py").write_text(f"raise {error}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"does not load: libx\.so\.1$"):
        need("broken_thing")
    sys.modules.pop("broken_thing", None)
