"""Downloads over real HTTP from a hub on this machine: what arrives, and each way to fail."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download

from qwencli.config import ModelSource, ModelSpec
from qwencli.errors import DownloadError, ModelFileError
from qwencli.models import hub as module
from qwencli.models.folder import check_folder
from qwencli.models.hub import cached_repos, download, find_cached, repo_folder
from qwencli.models.resolve import locate
from tests.models.fake_hub import COMMIT, FakeHub, serve
from tests.models.tiny import write_model

REPO = "Owner/Tiny-VL"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    source = write_model(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    files |= {"README.md": b"no", "chat_template.jinja": b"yes", "pytorch_model.bin": b"no"}
    hub = FakeHub(REPO, files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def fails(expected, hint="", **options):
    with pytest.raises(DownloadError, match=expected) as caught:
        download(REPO, **options)
    assert "\n" not in caught.value.message
    assert hint in caught.value.hint and caught.value.hint
    return caught.value


def test_fetches_what_loading_needs_and_nothing_else(hub):
    folder = download(REPO)
    check_folder(folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    }
    assert find_cached(REPO) == folder
    assert list(cached_repos()) == [(REPO, folder)]


def test_locate_uses_the_cache_without_any_request(hub):
    spec = ModelSpec(REPO, ModelSource.HUB, repo_id=REPO)
    folder = locate(spec)
    hub.requests.clear()
    assert locate(spec, offline=True) == locate(spec) == folder
    assert hub.requests == []


def test_interrupted_download_is_not_complete_and_resumes(hub, monkeypatch):
    # The library waits a second before each of five tries.
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    hub.cut = "model.safetensors"
    fails("cannot be reached|HTTP", "again")
    assert find_cached(REPO) is None
    assert list(cached_repos()) == []
    error = fails("only partly downloaded and --offline is set", offline=True)
    assert "scenes" in error.hint
    hub.cut = None
    assert find_cached(REPO) is None
    check_folder(download(REPO))
    assert find_cached(REPO) is not None


def test_files_that_look_complete_do_not_count_while_unfinished(hub):
    folder = download(REPO)
    (repo_folder(REPO) / ".qwencli-unfinished").touch()
    assert find_cached(REPO) is None
    assert download(REPO) == folder
    assert find_cached(REPO) == folder


def test_missing_file_in_the_snapshot_is_not_complete(hub):
    folder = download(REPO)
    (folder / "tokenizer.json").unlink()
    assert find_cached(REPO) is None


def test_hint_for_a_damaged_file_in_the_cache_leads_to_a_whole_one(hub):
    folder = download(REPO)
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-10])
    with pytest.raises(ModelFileError, match="truncated") as caught:
        check_folder(folder)
    assert f"delete {blob} " in caught.value.hint
    blob.unlink()
    assert find_cached(REPO) is None
    check_folder(download(REPO))


def test_offline(hub, monkeypatch):
    fails("Owner/Tiny-VL is not on this machine and --offline is set", "scenes", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails("HF_HUB_OFFLINE is set")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("answer", "expected", "hint"),
    [
        ((404, {"X-Error-Code": "RepoNotFound"}), "no such model on the hub", "spelling"),
        ((401, {"X-Error-Code": "RepoNotFound"}), "no such model on the hub", "hf auth login"),
        ((403, {"X-Error-Code": "GatedRepo"}), "access refused, the model is gated", "terms"),
        ((403, {}), r"access refused \(HTTP 403\)", "hf auth login"),
        ((500, {}), "the hub answered HTTP 500", "again"),
    ],
)
def test_refusals_of_the_hub(hub, answer, expected, hint):
    hub.refuse = answer
    fails(expected, hint)
    assert find_cached(REPO) is None


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    fails("the hub cannot be reached", "check the network")


def test_no_disk_space_is_found_out_before_the_transfer(hub, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1_000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    hub.files["model.safetensors"] = bytes(60_000_000)
    fails(r"needs 0\.1 GB in .*cache, 0\.0 GB is free", "HF_HOME")
    assert not any("resolve" in path for _, path in hub.requests)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, "disk became full"), (errno.EACCES, "cannot write to /x/y .*denied")],
)
def test_disk_trouble_during_the_transfer(hub, monkeypatch, number, expected):
    def broken(*args, **options):
        raise OSError(number, "Permission denied", "/x/y")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    fails(expected, "HF_HOME")


def test_transfer_backend_error(hub, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("Data processing error: connection reset\nlong trace")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    fails(r"cannot be reached \(Data processing error: connection reset\)")


def test_invalid_id(hub):
    with pytest.raises(DownloadError, match="not a valid hub id"):
        download("Owner/a--b..c")


def test_pickle_only_repository(hub):
    del hub.files["model.safetensors"]
    with pytest.raises(ModelFileError, match="only pickle weights") as caught:
        download(REPO)
    assert "--allow-pickle" in caught.value.hint
    folder = download(REPO, allow_pickle=True)
    assert (folder / "pytorch_model.bin").is_file()
    assert find_cached(REPO) is None
    assert find_cached(REPO, allow_pickle=True) == folder


def test_unknown_family_is_refused_before_its_weights(hub):
    hub.files["config.json"] = json.dumps({"model_type": "llama"}).encode()
    with pytest.raises(ModelFileError, match="'llama' is not supported"):
        download(REPO)
    assert not any("safetensors" in path for _, path in hub.requests)


def test_repository_without_config(hub):
    del hub.files["config.json"]
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        download(REPO)


def test_snapshot_of_main_is_preferred(hub):
    folder = download(REPO)
    newer = folder.parent / ("b" * 40)
    shutil.copytree(folder, newer)
    assert find_cached(REPO) == folder
    shutil.rmtree(folder)
    assert find_cached(REPO) == newer
    assert folder.name == COMMIT


def test_local_folder_is_located_as_it_is(model_folder):
    spec = ModelSpec("x", ModelSource.LOCAL, path=model_folder)
    assert locate(spec) == model_folder
    with pytest.raises(ModelFileError, match="no such folder"):
        locate(ModelSpec("x", ModelSource.LOCAL, path=Path("absent")))
