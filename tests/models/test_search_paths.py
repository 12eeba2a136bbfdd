"""What a user may point at in place of a model folder, and folders that are not to be read."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from qwencli.cli import run
from qwencli.errors import DownloadError, ModelFileError, QwenCliError
from qwencli.models import hub
from qwencli.models.folder import check_folder
from qwencli.models.hub import cached_repos, download, find_cached, unfinished_downloads
from qwencli.models.resolve import SearchPaths, resolve_model

Made = Callable[[str], Path]


@pytest.fixture
def here(tmp_path: Path) -> SearchPaths:
    return SearchPaths(working_folder=tmp_path, config_folder=tmp_path / "config", environ={})


def refused(name: str, here: SearchPaths) -> QwenCliError:
    with pytest.raises(QwenCliError) as caught:
        check_folder(resolve_model(name, search_paths=here).path or Path("not local"))
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("files", "given", "said", "todo"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "Qwen/X"}'}, "m", "Qwen/X", "merge"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "m", "adapter", "merge"),
        ({"x-Q4_K_M.gguf": "GGUF"}, "m", "GGUF", "safetensors"),
        ({"x-Q4_K_M.gguf": "GGUF"}, "m/x-Q4_K_M.gguf", "a GGUF file", "safetensors"),
        ({"model.safetensors": ""}, "m/model.safetensors", "weights alone", "folder that holds"),
        ({"a.bin": ""}, "m/a.bin", "weights alone", "folder that holds"),
        ({"a.txt": ""}, "m/a.txt", "is a file", "folder that holds"),
        ({"weights.npz": ""}, "m", "MLX", "original"),
        ({"model_index.json": "{}"}, "m", "diffusers pipeline", "folder that holds"),
        ({"a.txt": ""}, "m", "no config.json", "folder that holds"),
        ({"checkpoint-10/config.json": "{}"}, "m", "no config.json", "checkpoint-10"),
        ({"blobs/x": "", "snapshots/x/config.json": "{}"}, "m", "hub cache", "--model"),
    ],
)
def test_what_is_no_model_folder_is_named(
    here: SearchPaths, files: dict[str, str], given: str, said: str, todo: str
) -> None:
    for name, text in files.items():
        path = here.working_folder / "m" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in (str(here.working_folder / given), f"./{given}"):
        error = refused(name, here)
        assert said in error.message and todo in error.hint


def test_an_existing_path_is_no_hub_id(here: SearchPaths) -> None:
    (here.working_folder / "a" / "b" / "notes").mkdir(parents=True)
    error = refused("a/b", here)
    assert isinstance(error, ModelFileError)
    assert "no config.json" in error.message and "on the hub" in error.hint
    (here.working_folder / "a" / "c.gguf").write_bytes(b"GGUF")
    assert "a GGUF file" in refused("a/c.gguf", here).message
    assert resolve_model("a/d", search_paths=here).repo_id == "a/d"


def test_an_adapter_beside_a_configuration_is_one_too(
    checkpoint: Made, tmp_path: Path, here: SearchPaths
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), folder)
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "is a LoRA adapter" in refused(str(folder), here).message


def test_quantized_for_mlx(checkpoint: Made, tmp_path: Path, here: SearchPaths) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said = {"group_size": 64, "bits": 4}
    config |= {"quantization": said, "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    error = refused(str(folder), here)
    assert "quantized for MLX with 4 bits" in error.message and "original" in error.hint


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_git_lfs_pointers(checkpoint: Made, tmp_path: Path, here: SearchPaths, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3995432\n"
    (folder / name).write_text(pointer, encoding="utf-8")
    error = refused(str(folder), here)
    assert "Git LFS" in error.message and name in error.message and "git lfs pull" in error.hint


@pytest.mark.parametrize("address", ["hf-mirror.com", "//hf-mirror.com", "ftp://hf-mirror.com"])
def test_an_address_of_the_hub_without_its_scheme(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(DownloadError, match="HF_ENDPOINT") as caught:
        download("Owner/Name")
    assert "https://" in caught.value.hint and "hf-mirror.com" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."), "SOCKS"),
        (ValueError("Unknown scheme for proxy URL URL('foo://user:secret@h')"), "proxy"),
    ],
)
def test_a_proxy_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("ALL_PROXY", "socks5://user:secret@localhost:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(DownloadError, match=said) as caught:
        download("Owner/Name")
    assert "ALL_PROXY" in caught.value.message and "secret" not in str(caught.value)


# --- folders that nobody may read -------------------------------------------------------------


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not look into."""
    if sys.platform == "win32":
        pytest.skip("permissions are others there")
    folder = tmp_path / "locked"
    (folder / "inside").mkdir(parents=True)
    folder.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        tmp_path.chmod(0o755)
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    folder.chmod(0o755)


def test_a_model_folder_that_cannot_be_read(locked: Path, here: SearchPaths) -> None:
    for place in (locked, locked / "inside"):
        with pytest.raises(ModelFileError, match="cannot be read") as caught:
            check_folder(place)
        assert "permissions" in caught.value.hint


def test_a_working_folder_that_cannot_be_read_has_no_models(locked: Path, tmp_path: Path) -> None:
    search_paths = SearchPaths(working_folder=locked, config_folder=tmp_path / "config", environ={})
    assert not search_paths.custom_models(None).specs
    assert resolve_model("scenes", search_paths=search_paths).path is not None
    assert resolve_model("a/d", search_paths=search_paths).repo_id == "a/d"


def test_a_configuration_that_cannot_be_read(locked: Path, tmp_path: Path) -> None:
    search_paths = SearchPaths(working_folder=tmp_path, config_folder=locked, environ={})
    with pytest.raises(QwenCliError, match="cannot be read") as caught:
        resolve_model(None, search_paths=search_paths)
    assert "permissions" in caught.value.hint


def test_a_hub_cache_that_cannot_be_read(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cache_root", lambda: locked)
    monkeypatch.setattr("qwencli.models.hub.cache_root", lambda: locked)
    assert find_cached("Owner/Name") is None
    assert not list(cached_repos())
    assert not list(unfinished_downloads())
    with pytest.raises(DownloadError, match="cannot be read") as caught:
        download("Owner/Name", offline=True)
    assert "HF_HOME" in caught.value.hint


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be deleted there")
def test_a_working_folder_that_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run(["models"]) == 0
    assert "scenes" in capsys.readouterr().out
    assert run(["caption", "missing.png", "--model", "scenes"]) == 1
    assert "missing.png" in capsys.readouterr().err
    picture = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(picture)
    assert run(["caption", str(picture), "--model", "scenes", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "working folder" in err and err.count("\n") == 1


@pytest.mark.parametrize("home", ["", None])
def test_without_a_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: str | None
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert run(["models"]) == 0
    assert "scenes" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", [["qwen3"], {"a": 1}, 5, None, True, "qwen9"])
@pytest.mark.parametrize("command", [["caption"], ["models"]])
def test_a_model_type_that_is_none(
    checkpoint: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_type: object,
    command: list[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    monkeypatch.chdir(tmp_path)
    if command == ["models"]:
        assert run(command) == 0
        return
    picture = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(picture)
    assert run([*command, str(picture), "--model", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "model_type" in err and "fault of qwencli" not in err and err.count("\n") == 1
