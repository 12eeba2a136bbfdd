"""The pack lands in a ComfyUI as a whole, replaces only itself, and is what the registry reads."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwencli.comfyui import install
from qwencli.comfyui.schemas import NODES
from qwencli.errors import InputError, OutputError

ROOT = Path(__file__).parents[2]
PACK = ROOT / "comfyui_nodes"


def comfyui(folder):
    for name in ("comfy", "custom_nodes"):
        (folder / name).mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (folder / name).touch()
    return folder


def names(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("given", ["ComfyUI", "ComfyUI/custom_nodes", "."])
def test_the_folder_its_custom_nodes_and_the_portable_folder_are_taken(tmp_path, given):
    target = comfyui(tmp_path / "ComfyUI") / "custom_nodes" / install.PACK_NAME
    done = install.install_pack(tmp_path / given)
    assert (done.folder.resolve(), done.before) == (target.resolve(), None)
    assert names(target) == names(PACK)
    assert names(target.parent) == {f"{install.PACK_NAME}/{name}" for name in names(PACK)}


def test_custom_nodes_on_another_disk_is_taken(tmp_path):
    nodes = comfyui(tmp_path / "ComfyUI") / "custom_nodes"
    nodes.rmdir()
    (tmp_path / "nodes").mkdir()
    nodes.symlink_to(tmp_path / "nodes")
    assert install.install_pack(nodes).folder.parent == nodes
    assert names(tmp_path / "nodes" / install.PACK_NAME) == names(PACK)


def test_a_pack_under_another_name_is_the_one_that_is_upgraded(tmp_path):
    folder = install.install_pack(comfyui(tmp_path)).folder
    other = folder.rename(folder.with_name("qwencli_nodes"))
    done = install.install_pack(tmp_path)
    assert (done.folder, done.before) == (other, install.qwencli.__version__)
    assert [path.name for path in folder.parent.iterdir()] == [other.name]


def test_a_data_folder_of_the_desktop_application_is_taken(tmp_path):
    for name in ("custom_nodes", "models", "input", "output", "user"):
        (tmp_path / name).mkdir()
    assert install.install_pack(tmp_path).folder.is_dir()


def test_an_upgrade_replaces_the_pack_and_keeps_what_a_person_added(tmp_path):
    target = install.install_pack(comfyui(tmp_path)).folder
    (target / "__init__.py").write_text("old")
    (target / "example_workflows" / "mine.json").write_text("{}")
    assert install.install_pack(tmp_path).before
    assert (target / "__init__.py").read_bytes() == (PACK / "__init__.py").read_bytes()
    assert (target / "example_workflows" / "mine.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.touch(), "is a file"),
        (lambda path: path.mkdir(), "is no ComfyUI folder"),
        (lambda path: shutil.rmtree(comfyui(path) / "comfy"), "is no ComfyUI folder"),
    ],
)
def test_what_is_no_comfyui_is_refused_in_one_line(tmp_path, make, said):
    make(tmp_path / "it")
    with pytest.raises(InputError, match=said) as error:
        install.install_pack(tmp_path / "it")
    assert "\n" not in error.value.message
    assert "main.py" in error.value.hint


def test_a_path_that_no_system_has_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read|no such folder"):
        install.install_pack(tmp_path / ("x" * 4000))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda target: target.touch(), "a file is in the way"),
        (lambda target: target.mkdir(), "not qwencli's"),
        (lambda target: target.symlink_to(PACK), "is a link to .*, the pack"),
        (lambda target: (target.parent / "mine").symlink_to(PACK), "is a link to .*, the pack"),
        (lambda target: target.symlink_to(target.parent / "gone"), "a link is in the way"),
        (
            lambda target: (target.mkdir(), (target / "pyproject.toml").write_text("[project]\n")),
            "not qwencli's",
        ),
        (
            lambda target: (target.mkdir(), (target / "pyproject.toml").write_bytes(b"\xff")),
            "not qwencli's",
        ),
    ],
)
def test_what_is_not_ours_stays(tmp_path, make, said):
    target = comfyui(tmp_path) / "custom_nodes" / install.PACK_NAME
    make(target)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=said):
        install.install_pack(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


OLDER, NEWER = "0.0.9", "99.0"


def pack_of(folder, version):
    folder.mkdir(parents=True)
    text = (PACK / "pyproject.toml").read_text("utf-8")
    version = f'version = "{version}"' if version else "# version"
    text = re.sub(r'^version = ".*"', version, text, flags=re.M)
    (folder / "pyproject.toml").write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (OLDER, f"upgraded from {OLDER} to {install.qwencli.__version__}"),
        (install.qwencli.__version__, "its files are as they came, of version"),
        ("next", "upgraded from an unknown version to"),
        ("", "upgraded from an unknown version to"),
    ],
)
def test_what_became_of_the_pack_that_was_there_is_said(tmp_path, before, said):
    target = pack_of(comfyui(tmp_path) / "custom_nodes" / install.PACK_NAME, before)
    assert said in install.install_pack(tmp_path).said
    assert names(target) == names(PACK)
    assert install.install_pack(tmp_path).before == install.qwencli.__version__


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        ({install.PACK_NAME: NEWER}, f"version {NEWER} is there, and this qwencli has"),
        ({install.PACK_NAME: OLDER, "also": OLDER}, "more than once: also and qwencli-nodes"),
    ],
)
def test_a_newer_pack_and_two_of_them_stay(tmp_path, folders, said):
    nodes = comfyui(tmp_path) / "custom_nodes"
    for name, version in folders.items():
        pack_of(nodes / name, version)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=said) as error:
        install.install_pack(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before and error.value.hint


@pytest.mark.parametrize(
    ("told", "given"),
    [
        ('{"url": "file:///no/where"}', "path/to/qwencli"),
        (f'{{"url": "{ROOT.as_uri()}", "dir_info": {{"editable": true}}}}', f'"{ROOT}"'),
        ('{"url": "https://a.example/qwencli-0.1.zip"}', '"https://a.example/qwencli-0.1.zip"'),
        ('{"url": "https://a.example/q", "vcs_info": {"vcs": "git", "commit_id": "12"}}',
         '"git+https://a.example/q@12"'),
        (None, "path/to/qwencli"),
        ("[]", "path/to/qwencli"),
    ],
)  # fmt: skip
def test_what_pip_is_given_is_where_this_package_came_from(tmp_path, monkeypatch, told, given):
    assert install.requirement() == f'"{ROOT}"'
    monkeypatch.setattr(install.qwencli, "__file__", str(tmp_path / "qwencli" / "__init__.py"))
    found = SimpleNamespace(read_text=lambda name: told)
    monkeypatch.setattr(install.metadata, "distribution", lambda name: found)
    assert install.requirement() == given


def test_a_file_that_stands_for_custom_nodes_is_told(tmp_path):
    (comfyui(tmp_path) / "custom_nodes").rmdir()
    (tmp_path / "custom_nodes").touch()
    with pytest.raises(InputError, match="a file is in the way"):
        install.install_pack(tmp_path)


def test_a_link_to_nothing_that_stands_for_custom_nodes_is_told(tmp_path):
    (comfyui(tmp_path) / "custom_nodes").rmdir()
    (tmp_path / "custom_nodes").symlink_to("gone")
    with pytest.raises(InputError, match="a link to nothing is in the way"):
        install.install_pack(tmp_path)


def test_other_packs_may_have_any_project_file(tmp_path):
    nodes = comfyui(tmp_path) / "custom_nodes"
    for name in ("deep", "bytes", "pipe", "folder"):
        (nodes / name).mkdir()
    (nodes / "deep/pyproject.toml").write_text("a = " + "[" * 5000)
    (nodes / "bytes/pyproject.toml").write_bytes(b"\xff\0")
    (nodes / "folder/pyproject.toml").mkdir()
    os.mkfifo(nodes / "pipe/pyproject.toml")
    assert install.install_pack(tmp_path).before is None


def test_a_copy_that_failed_names_the_reason_alone(tmp_path, monkeypatch):
    def full(*_, **__):
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")] * 2)

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OutputError, match=r"cannot be written: No space left on device$"):
        install.install_pack(comfyui(tmp_path))


@pytest.mark.parametrize("failing", ["copytree", "rename"])
def test_when_it_cannot_be_written_the_old_pack_stays(tmp_path, monkeypatch, failing):
    target = install.install_pack(comfyui(tmp_path)).folder
    (target / "__init__.py").write_text("old")

    def fails(*_, **__):
        raise PermissionError(13, "Permission denied")

    if failing == "copytree":
        monkeypatch.setattr(shutil, "copytree", fails)
    else:
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda self, to: fails() if self.name == "new" else rename(self, to)
        )
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        install.install_pack(tmp_path)
    assert (target / "__init__.py").read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == [install.PACK_NAME]


@pytest.mark.parametrize(
    "program", [".venv/bin/python", "venv/Scripts/python.exe", "../python_embeded/python.exe"]
)
def test_the_python_beside_it_is_found(tmp_path, program):
    folder = comfyui(tmp_path / "ComfyUI")
    assert install.find_python(folder) is None
    path = (folder / program).resolve()
    path.parent.mkdir(parents=True)
    path.touch()
    assert install.find_python(folder).resolve() == path


def test_a_python_is_asked_which_qwencli_it_has(tmp_path):
    def python(text):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    assert install.qwencli_in(python("echo '[\"9.9\", true]'")) == "9.9"
    assert install.qwencli_in(python("echo '[\"0.0\", false]'")) is None
    assert install.qwencli_in(python("echo a warning; echo '[\"9.9\", true]'")) == "9.9"
    for other in ("5", "null", "{}", "[1]", "[1, 2, 3]", "", "'[[['"):
        assert install.qwencli_in(python(f"echo {other}")) is None
    assert install.qwencli_in(python("echo no module named qwencli >&2; exit 1")) is None
    path = python("")
    path.write_bytes(b"\x7fELF")
    with pytest.raises(InputError, match="cannot be run"):
        install.qwencli_in(path)


def test_a_wheel_holds_the_pack_where_it_is_looked_for(tmp_path, monkeypatch):
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    ((source, inside),) = build["targets"]["wheel"]["force-include"].items()
    shutil.copytree(ROOT / source, tmp_path / inside)
    monkeypatch.setattr(install.qwencli, "__file__", str(tmp_path / "qwencli" / "__init__.py"))
    assert names(install.pack_folder()) == names(PACK)
    shutil.rmtree(tmp_path / inside)
    with pytest.raises(InputError, match="the node pack is missing"):
        install.pack_folder()


def test_the_projects_file_keeps_to_the_registrys_rules():
    told = tomllib.loads((PACK / "pyproject.toml").read_text("utf-8"))
    project, comfy = told["project"], told["tool"]["comfy"]
    assert project["name"] == install.PACK_NAME
    assert re.fullmatch(r"[A-Za-z](?:[A-Za-z0-9]|[-_.](?![-_.])){0,98}", project["name"])
    assert project["version"] == install.qwencli.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert set(project["license"]) == {"text"}
    assert set(comfy) <= {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"}
    assert re.fullmatch(r"[<>=!~]+\d+\.\d+\.\d+", comfy["requires-comfyui"])


def test_the_pack_gives_comfyui_the_entry_point():
    spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    assert len(asyncio.run(extension.get_node_list())) == len(NODES)


def test_without_qwencli_the_pack_says_what_to_install():
    without = "import sys; sys.modules['qwencli'] = None; sys.path.pop(0)\n"
    ran = subprocess.run(
        [sys.executable, "-c", f"{without}exec(open('__init__.py').read())"],
        cwd=PACK,
        capture_output=True,
        text=True,
        check=False,
    )
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("ImportError: the nodes of qwencli need the package qwencli")
    assert f'source folder: "{sys.executable}" -m pip install --upgrade path/to/qwencli' in last
