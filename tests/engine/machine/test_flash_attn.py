"""What flash-attn says where it does not fit, word for word, and what is made of it."""

from __future__ import annotations

import pytest

from qwencli.engine.machine.flash_attn import (
    BUILD,
    INSTALL,
    UPGRADE,
    load_misfit,
    misfit,
    run_misfit,
)
from tests import flash_attn_package

SO = "/x/site-packages/flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so"
CUDA_ERROR = (
    "CUDA error: no kernel image is available for execution on the device\n"
    "Search for `cudaErrorNoKernelImageForDevice' in the documentation for more information."
)
AT_IMPORT = [
    (f"ImportError('{SO}: undefined symbol: _ZN3c104cuda9SetDeviceEab')", "another torch", BUILD),
    ("ImportError('libcudart.so.12: cannot open shared object file: No such file or directory')",
     "built for CUDA 12", BUILD),
    ("ImportError('libc10_cuda.so: cannot open shared object file: No such file or directory')",
     "a torch with CUDA", "install a torch with CUDA"),
    ("ImportError(\"/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required "
     f"by {SO})\")", "GLIBC_2.38", BUILD),
    ("ModuleNotFoundError(\"No module named 'flash_attn_2_cuda'\")", "another Python's", BUILD),
    ("ImportError('DLL load failed while importing flash_attn_2_cuda: The specified procedure "
     "could not be found.')", "another torch", BUILD),
    ("OSError('disk on fire')", "does not load", BUILD),
    ("ValueError('numpy.dtype size changed')", "does not load", BUILD),
]  # fmt: skip
AT_LAUNCH = [
    (CUDA_ERROR, "not built for this GPU", "FLASH_ATTN_CUDA_ARCHS=90 " + BUILD),
    ("CUDA error: the provided PTX was compiled with an unsupported toolchain.", "newer than",
     "update the NVIDIA driver"),
    ("FlashAttention only supports Ampere GPUs or newer.", "Ampere GPU or a newer", ""),
    ("FlashAttention only support fp16 and bf16 data type", "float16 alone", "--dtype bfloat16"),
    ("FlashAttention forward only supports head dimension at most 256", "above 256", UPGRADE),
    ("this build of flash-attn has no kernels for heads of 192", "without heads of 192", BUILD),
    ("This flash attention build does not support headdim not being a multiple of 32.",
     "without headdim not being a multiple of 32", BUILD),
]  # fmt: skip


@pytest.mark.parametrize(("raised", "what", "fix"), AT_IMPORT)
def test_a_package_that_does_not_load(tmp_path, raised, what, fix):
    with flash_attn_package.installed(tmp_path, f"raise {raised}"):
        found = load_misfit()
    assert found is not None
    assert what in str(found) and found.fix.startswith(fix)
    assert found.cause and "\n" not in found.cause


@pytest.mark.parametrize(("said", "what", "fix"), AT_LAUNCH)
def test_kernels_that_do_not_run(said, what, fix):
    found = misfit(said, (9, 0))
    assert found is not None
    assert what in found.what and found.fix == fix
    assert found.cause == said.splitlines()[0]


def test_what_is_not_known_is_not_guessed():
    assert misfit("CUDA error: an illegal memory access was encountered") is None


def test_packages_that_are_not_there_old_or_not_it(tmp_path):
    assert "not installed" in str(load_misfit())
    (tmp_path / "four" / "flash_attn" / "cute").mkdir(parents=True)
    with flash_attn_package.installed(tmp_path / "stub"):
        assert load_misfit() is None and load_misfit(for_transformers=True) is None
    with flash_attn_package.installed(
        tmp_path / "old", '__version__ = "2.5.9"\nflash_attn_func = 1'
    ):
        found = load_misfit()
    assert found is not None and "no flash_attn_with_kvcache" in found.what
    old = flash_attn_package.INTERFACE.replace("2.8.3", "2.7.4.post1")
    with flash_attn_package.installed(tmp_path / "older", old):
        found = load_misfit()
    assert found is not None and "2.7.4.post1 is older than 2.8" in found.what
    assert found.fix == UPGRADE


def test_flash_attn_4_alone_is_another_package(tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = load_misfit()
    assert found is not None and "only another of its name" in found.what and found.fix == INSTALL


def test_transformers_needs_einops_too(tmp_path):
    padding = "raise ModuleNotFoundError(\"No module named 'einops'\")"
    with flash_attn_package.installed(tmp_path, padding=padding):
        assert load_misfit() is None
        found = load_misfit(for_transformers=True)
    assert found is not None and "needs the package einops" in found.what
    assert found.fix == "pip install einops"


def test_heads_are_tried_in_the_models_type(tmp_path):
    with flash_attn_package.installed(tmp_path):
        assert run_misfit((64, 128), "bfloat16", "cpu") is None
        found = run_misfit((64,), "float32", "cpu")
        assert found is not None and found.fix == "--dtype bfloat16"
        found = run_misfit((64, 512), "bfloat16", "cpu")
        assert found is not None and "above 256" in found.what
