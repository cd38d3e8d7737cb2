"""Compile the msa operators of an AOTInductor package: the CPU kernels behind torch's C interface, as one archive."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.backends.cpu import get_cpu_capability

from msa_compile import _compat
from msa_compile.errors import ExportFormatError
from msa_compile.kernels import native
from msa_compile.kernels.cache_dir import cache_dir

# Of the archive, which the linker is asked for.
NAME = "msa_package_ops"
# What the generated code may call, as its declaration; the definitions are in `package_ops.cpp`.
_T, _O, _N = "AtenTensorHandle", "AtenTensorHandle*", "int64_t"
_SIGNATURES = {
    "select_blocks": [_T, _T, _N, _N, _N, _N, _O, _O, _O, _O, _O, _N, "int32_t", _N, _O],
    "block_sparse_attention": [_T, _T, _T, _T, _N, "double*", "double*", _O, "int64_t*", _O, _O, _O, _O, _O, _N,
                               "int32_t", _O],
    "write_cache": [_T, _T, _T, _O],
}  # fmt: skip
_SOURCE = Path(__file__).with_suffix(".cpp")
_KERNELS = Path(native.__file__).parent
# As the kernels are compiled at run time: NaN and infinity have their meaning in them.
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-march=native", "-fopenmp", "-c")


def declarations() -> dict[_compat.OpOverload, list[str]]:
    """For each operator the C function that stands for it."""
    return {
        getattr(torch.ops.msa, name).default: [f"AOTITorchError aoti_torch_cpu_{name}({', '.join(types)})"]
        for name, types in _SIGNATURES.items()
    }


def build_package_ops() -> Path:
    """The folder of the archive, which the first export on a machine compiles, in some seconds.

    Raises:
        ExportFormatError: There is no compiler, or it does not take the source.
    """
    sources = [_SOURCE, *sorted(_KERNELS.glob("*.h")), *sorted(_KERNELS.glob("*.cpp"))]
    try:
        compiler = shlex.split(_compat.cpp_compiler())
    except Exception as error:
        raise ExportFormatError(f"an AOTInductor package is compiled, and there is no C++ compiler: {error}") from error
    machine = (torch.__version__, platform.machine(), get_cpu_capability())
    key = hashlib.sha256(" ".join([*compiler, *_FLAGS, *machine]).encode())
    for source in sources:
        key.update(source.read_bytes())
    folder = cache_dir() / "native" / f"package-{key.hexdigest()[:16]}"
    archive = folder / f"lib{NAME}.a"
    if not archive.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            compiled, packed = Path(made) / "ops.o", Path(made) / archive.name
            include = Path(torch.__file__).parent / "include"
            _run([*compiler, *_FLAGS, f"-I{_KERNELS}", f"-I{include}", str(_SOURCE), "-o", str(compiled)])
            _run(["ar", "rcs", str(packed), str(compiled)])
            os.replace(packed, archive)
    return folder


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ExportFormatError(f"an AOTInductor package is compiled, which needs {command[0]}: {error}") from error
    if done.returncode:
        raise ExportFormatError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
