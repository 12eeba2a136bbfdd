#!/usr/bin/env python3
"""Build flash-attn for inference on one GPU architecture, from its source distribution.

A full build of flash-attn compiles 73 files for four architectures: hours on two cores. This one
leaves out what inference here never calls, compiles for one architecture, and makes a wheel whose
version says so (`+inference`). The sources are used as they are.

Left out, and what a call of it then says:

- the backward pass ("This flash attention build does not support backward."): nothing trains here;
- dropout, ALiBi slopes, softcap and local windows ("... does not support dropout." and so on): no
  model that qwencli loads has one;
- heads of a class that `--heads` does not name ("this build of flash-attn has no kernels for heads
  of 192"). A class takes all heads up to its number from the next smaller one on: 32 (the tests'
  models), 64 (Qwen3-VL-2B and 4B see with it), 96 (pictures of the larger models: heads of 72 and
  80), 128 (every Qwen3-VL's text), 256 (Qwen3.5's text);
- every architecture but `--arch`, and PTX: another GPU says "no kernel image is available".

What it needs: nvcc of the CUDA release that torch was built with (installed, or the packages
nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm, nvidia-cuda-cccl and nvidia-cuda-runtime), g++, the
headers of the torch and the Python that will load it (by default those of the Python that runs
this), and the source distribution (by default fetched with pip).

    python tools/build_flash_attn.py --arch 90 --out dist
    python tools/build_flash_attn.py --torch unpacked/torch --python-include include/python3.12 \\
        --source flash_attn-2.8.3.post2.tar.gz --out dist

Objects that are there already are not compiled again, so a build that was stopped goes on.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

VERSION = "2.8.3.post2"
# Heads up to so many numbers share kernels.
CLASSES = (32, 64, 96, 128, 192, 256)
TYPES = {"bf16": "cutlass::bfloat16_t", "fp16": "cutlass::half_t"}
LEFT_OUT = ("BACKWARD", "DROPOUT", "ALIBI", "SOFTCAP", "LOCAL")
NVCC_FLAGS = (
    "-O3", "-std=c++17", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", "-Xcompiler", "-fPIC",
    "-Xcudafe", "--diag_suppress=1444", "-Xcompiler", "-Wno-deprecated-declarations",
)  # fmt: skip
TORCH_LIBRARIES = ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python")


@dataclass(frozen=True)
class Setup:
    """Where everything is that the build takes, and what it makes."""

    source: Path
    torch: Path
    python_include: Path
    nvcc: Path
    cuda: Path
    work: Path
    arch: str
    heads: tuple[int, ...]
    types: tuple[str, ...]

    def flags(self) -> list[str]:
        kernels = self.source / "csrc" / "flash_attn"
        cutlass = self.source / "csrc" / "cutlass" / "include"
        system = (
            self.torch / "include",
            self.torch / "include" / "torch" / "csrc" / "api" / "include",
            self.python_include,
            self.cuda / "include",
            self.cuda / "include" / "cccl",
        )
        return [
            *(f"-DFLASHATTENTION_DISABLE_{what}" for what in LEFT_OUT),
            "-DTORCH_EXTENSION_NAME=flash_attn_2_cuda",
            "-DTORCH_API_INCLUDE_EXTENSION_H",
            *(f"-I{path}" for path in (kernels, kernels / "src", cutlass)),
            *(word for path in system for word in ("-isystem", str(path))),
        ]


def kernel_files(heads: Sequence[int], types: Sequence[str]) -> list[str]:
    """Sources of the forward kernels, those of the whole prompt and those of split keys."""
    return [
        f"flash_fwd_{split}hdim{head}_{kind}_{causal}sm80.cu"
        for kind, head, split, causal in product(types, heads, ("", "split_"), ("", "causal_"))
    ]


def refusals(heads: Sequence[int], types: Sequence[str]) -> str:
    """C++ of the kernels left out: flash_api.cpp names every one of them, so that the extension
    would not load without. Each says what this build has instead."""
    bodies = []
    for kind, head, causal in product(TYPES, CLASSES, ("false", "true")):
        # flash_api.cpp says by itself that there is no backward pass, and yet links it.
        bodies.append(
            f"template<> void run_mha_bwd_<{TYPES[kind]}, {head}, {causal}>"
            "(Flash_bwd_params &, cudaStream_t) {}"
        )
        if kind in types and head in heads:
            continue
        what = f"heads of {head}" if kind in types else f"{kind} (heads of {head})"
        said = f'TORCH_CHECK(false, "this build of flash-attn has no kernels for {what}");'
        for name in ("run_mha_fwd_", "run_mha_fwd_splitkv_dispatch"):
            bodies.append(
                f"template<> void {name}<{TYPES[kind]}, {head}, {causal}>"
                f"(Flash_fwd_params &, cudaStream_t) {{ {said} }}"
            )
    return "\n".join(
        ["#include <c10/util/Exception.h>", "#include <cutlass/numeric_types.h>",
         '#include "namespace_config.h"', '#include "flash.h"', "namespace FLASH_NAMESPACE {",
         *bodies, "}", ""]
    )  # fmt: skip


def compile_all(setup: Setup, jobs: int) -> list[Path]:
    objects = setup.work / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    kernels = setup.source / "csrc" / "flash_attn"
    stubs = setup.work / "refusals.cpp"
    stubs.write_text(refusals(setup.heads, setup.types))
    gencode = f"-gencode=arch=compute_{setup.arch},code=sm_{setup.arch}"
    nvcc = [str(setup.nvcc), gencode, *NVCC_FLAGS, *setup.flags()]
    gxx = ["g++", "-O3", "-std=c++17", "-fPIC", "-Wno-deprecated-declarations", *setup.flags()]
    # What takes longest begins first.
    names = kernel_files(sorted(setup.heads, reverse=True), setup.types)
    sources = [(nvcc, kernels / "src" / name) for name in names]
    sources += [(gxx, kernels / "flash_api.cpp"), (gxx, stubs)]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda task: _compile(*task, objects), sources))


def _compile(command: list[str], source: Path, objects: Path) -> Path:
    # The name tells what it was made from: other flags make another object.
    made = hashlib.sha256("\0".join([*command, source.read_text()]).encode()).hexdigest()[:12]
    target = objects / f"{source.stem}-{made}.o"
    if target.exists():
        return target
    part = target.with_suffix(".part.o")
    began = time.monotonic()
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(part)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{source.name} does not compile:\n{done.stderr[-4000:]}")
    part.rename(target)
    size = target.stat().st_size / 1e3
    print(f"{source.name}: {time.monotonic() - began:.0f} s, {size:.0f} KB", flush=True)
    return target


def link(setup: Setup, objects: Sequence[Path], name: str) -> Path:
    library = setup.work / name
    # Beside the compiler, or where the packages that torch needs have it.
    packages = setup.torch.parent / "nvidia"
    folders = [setup.cuda / "lib64", setup.cuda / "lib", *sorted(packages.glob("c*/lib"))]
    runtime = next((file for each in folders for file in each.glob("libcudart.so*")), None)
    if runtime is None:
        searched = ", ".join(map(str, folders))
        sys.exit(f"no libcudart.so in {searched}: install nvidia-cuda-runtime")
    subprocess.run(
        ["g++", "-shared", "-s", "-o", str(library), *map(str, objects),
         f"-L{setup.torch / 'lib'}", *(f"-l{name}" for name in TORCH_LIBRARIES), str(runtime),
         # libtorch_cuda needs libraries of CUDA that are found where it is loaded.
         "-Wl,--allow-shlib-undefined"],
        check=True,
    )  # fmt: skip
    unresolved = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    missing = re.findall(r"\S*run_mha\S*", unresolved)
    if missing:
        sys.exit(f"{len(missing)} kernels are named and not there: {missing[0]} and so on")
    return library


def torch_release(torch: Path) -> tuple[str, str]:
    """Version of torch without its label, and its CUDA release."""
    text = (torch / "version.py").read_text()
    version = re.search(r"__version__ = '([^']+)'", text)
    cuda = re.search(r"^cuda.*= '([^']+)'", text, re.MULTILINE)
    if version is None or cuda is None:
        sys.exit(f"{torch} is not a torch built with CUDA")
    return version[1].partition("+")[0], cuda[1]


def write_wheel(setup: Setup, library: Path, python_tag: str, version: str, out: Path) -> Path:
    """A wheel of the package's own Python files and the extension."""
    short = ".".join(torch_release(setup.torch)[0].split(".")[:2])
    cuda = torch_release(setup.torch)[1].replace(".", "")
    label = f"{version}+inference.sm{setup.arch}.cu{cuda}torch{short}"
    tag = f"{python_tag}-{python_tag}-linux_x86_64"
    out.mkdir(parents=True, exist_ok=True)
    wheel = out / f"flash_attn-{label}-{tag}.whl"
    info = f"flash_attn-{label}.dist-info"
    metadata = (setup.source / "PKG-INFO").read_text()
    metadata = re.sub(r"^Version: .*$", f"Version: {label}", metadata, count=1, flags=re.MULTILINE)
    made = {"heads": setup.heads, "types": setup.types, "arch": setup.arch, "left out": LEFT_OUT}
    files: list[tuple[str, bytes]] = [
        *_python_files(setup.source),
        (library.name, library.read_bytes()),
        (f"{info}/METADATA", metadata.encode()),
        (f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()),
        (f"{info}/top_level.txt", b"flash_attn\nflash_attn_2_cuda\n"),
        (f"{info}/LICENSE", (setup.source / "LICENSE").read_bytes()),
        (f"{info}/build.json", json.dumps(made).encode()),
    ]
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    for path, content in files:
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow([path, f"sha256={digest}", len(content)])
    rows.writerow([f"{info}/RECORD", "", ""])
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in [*files, (f"{info}/RECORD", table.getvalue().encode())]:
            archive.writestr(path, content)
    return wheel


def _python_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """The package without its parts for other GPUs, which are packages of their own (cute)."""
    for path in sorted((source / "flash_attn").rglob("*.py")):
        name = path.relative_to(source).as_posix()
        if not name.startswith("flash_attn/cute/"):
            yield name, path.read_bytes()


def unpacked(source: Path | None, work: Path, version: str) -> Path:
    """The folder of the source distribution, fetched with pip unless it is given."""
    if source is not None and source.is_dir():
        return source
    if source is None:
        # pip asks setup.py for the name of what it fetches, and that wants torch and no compiler.
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation",
             "--no-binary", "flash-attn", "-d", str(work), f"flash-attn=={version}"],
            check=True, env={**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"},
        )  # fmt: skip
        source = work / f"flash_attn-{version}.tar.gz"
    folder = work / "source"
    if not folder.exists():
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
    return next(folder.iterdir())


def find_nvcc(given: Path | None) -> tuple[Path, Path]:
    """nvcc, and the folder of its headers and libraries: on PATH, in CUDA_HOME, or a package's."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    beside = shutil.which("nvcc") or shutil.which("nvcc", path=str(toolkit))
    found = given or (None if beside is None else Path(beside))
    if found is None:
        spec = importlib.util.find_spec("nvidia")
        roots = [] if spec is None else list(spec.submodule_search_locations or ())
        found = next((nvcc for root in roots for nvcc in Path(root).glob("cu*/bin/nvcc")), None)
    if found is None:
        sys.exit(
            "no nvcc: pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl"
            " nvidia-cuda-runtime, of torch's CUDA release"
        )
    # It may be a script that calls the real one: what it says of itself tells where that is.
    said = subprocess.run(
        [str(found), "--dryrun", "-c", "-o", os.devnull, "-x", "cu", os.devnull],
        capture_output=True, text=True, check=False,
    ).stderr  # fmt: skip
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return found, Path(top[1]).resolve() if top else found.resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", default=VERSION)
    parser.add_argument("--source", type=Path, help="source distribution, packed or not")
    parser.add_argument("--torch", type=Path, help="the package's folder; default: this Python's")
    parser.add_argument(
        "--python-include", type=Path, default=Path(sysconfig.get_path("include")),
        help="folder of Python.h; the wheel is for that Python",
    )  # fmt: skip
    parser.add_argument("--nvcc", type=Path)
    parser.add_argument("--arch", default="90", help="compute capability without its point")
    parser.add_argument(
        "--heads", type=int, nargs="+", default=[128, 64, 32, 96, 256], choices=CLASSES
    )
    parser.add_argument("--types", nargs="+", default=["bf16", "fp16"], choices=list(TYPES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/flash_attn"))
    parser.add_argument("--out", type=Path, default=Path("dist"))
    chosen = parser.parse_args()
    began = time.monotonic()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch = chosen.torch
    if torch is None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            sys.exit("torch is not installed here; name its folder with --torch")
        torch = Path(spec.origin).parent
    nvcc, cuda = find_nvcc(chosen.nvcc)
    release = re.search(
        r"release (\S+),",
        subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout,
    )
    if release is None or release[1].split(".")[0] != torch_release(torch)[1].split(".")[0]:
        sys.exit(f"nvcc is of CUDA {release and release[1]}, torch of {torch_release(torch)[1]}")
    patch = (chosen.python_include / "patchlevel.h").read_text()
    numbers = dict(re.findall(r"#define PY_(MAJOR|MINOR)_VERSION\s+(\d+)", patch))
    tag = f"cp{numbers['MAJOR']}{numbers['MINOR']}"
    setup = Setup(
        unpacked(chosen.source, chosen.work, chosen.version), torch, chosen.python_include, nvcc,
        cuda, chosen.work, chosen.arch, tuple(chosen.heads), tuple(chosen.types),
    )  # fmt: skip
    objects = compile_all(setup, chosen.jobs)
    library = link(setup, objects, f"flash_attn_2_cuda.cpython-{tag[2:]}-x86_64-linux-gnu.so")
    wheel = write_wheel(setup, library, tag, chosen.version, chosen.out)
    minutes = (time.monotonic() - began) / 60
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB in {minutes:.1f} min", flush=True)


if __name__ == "__main__":
    main()
