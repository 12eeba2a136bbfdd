"""Devices: what runs on them, and what is said where nothing does."""

from __future__ import annotations

import pytest
import torch

from qwencli.engine.machine.host import has_code
from qwencli.engine.resolve import resolve_device
from qwencli.errors import DeviceError


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 9), ("sm_80", "sm_86"), True),  # code runs on a later minor version
        ((8, 0), ("sm_86",), False),  # but not on an earlier one
        ((12, 0), ("sm_90",), False),
        ((12, 0), ("sm_90", "compute_90"), True),  # PTX is compiled for what is newer
        ((7, 5), ("compute_80",), False),
        ((9, 0), ("sm_90a",), True),
        ((12, 0), ("sm_90a",), False),
        ((12, 1), ("sm_120f",), True),
        ((10, 3), ("sm_100",), True),
        ((12, 0), ("gfx942", "sm_x"), False),
    ],
)
def test_which_code_runs_on_which_device(capability, archs, runs):
    assert has_code(capability, archs) is runs


@pytest.fixture
def rtx_5090(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with one, and a torch that has code for `sm_120`."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (12, 0),
        "get_device_name": "NVIDIA GeForce RTX 5090",
        "get_arch_list": ["sm_80", "sm_90", "sm_120"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return monkeypatch


@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_torch_has_code_for(rtx_5090, asked):
    assert resolve_device(asked) == "cuda:0"


@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_torch_has_no_code_for_is_named_with_the_way_out(rtx_5090, asked):
    rtx_5090.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(
        DeviceError, match=r"no code for NVIDIA GeForce RTX 5090 \(sm_120\)"
    ) as error:
        resolve_device(asked)
    assert "only for sm_80 sm_90" in error.value.message
    assert "diagnose" in error.value.hint


@pytest.mark.parametrize("archs", [[], ["gfx942"]])
def test_builds_that_list_nothing_of_the_kind_are_not_refused(rtx_5090, archs):
    rtx_5090.setattr(torch.cuda, "get_arch_list", lambda: archs)
    rtx_5090.setattr(torch.version, "cuda", None if archs else "13.0")
    assert resolve_device("cuda") == "cuda:0"
