"""Whether engines can be built here; if not, an error that says what is missing and what to install."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from msa_compile.errors import MissingPackageError

# What this package was written against.
TORCH_TENSORRT, TENSORRT = "2.13", "11.0"
_INSTALL = (
    f"It needs a CUDA build of torch {TORCH_TENSORRT}, torch-tensorrt {TORCH_TENSORRT} (which brings TensorRT "
    f"{TENSORRT}) and triton, on a machine with an NVIDIA GPU of compute capability 8.0 or more: pip install "
    f"'torch=={TORCH_TENSORRT}.*' 'torch-tensorrt=={TORCH_TENSORRT}.*' 'triton>=3.6,<3.8'. Nothing was written."
)


def require_tensorrt() -> None:
    """Return where engines can be built.

    Raises:
        MissingPackageError: Naming the first thing that is missing.
    """
    for name in ("torch_tensorrt", "tensorrt", "triton"):
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(f"export to tensorrt: {name} is not installed. {_INSTALL}")
    if not torch.cuda.is_available():
        raise MissingPackageError(
            f"export to tensorrt: torch {torch.__version__} sees no CUDA device, and TensorRT builds an engine on the "
            f"GPU that it is for. {_INSTALL}"
        )
    try:
        found = importlib.import_module("torch_tensorrt").__version__
    # Its libraries are loaded when it is imported, and each has its own way to be missing.
    except Exception as error:
        raise MissingPackageError(
            f"export to tensorrt: torch_tensorrt cannot be imported: {error}. {_INSTALL}"
        ) from error
    if not str(found).startswith(f"{TORCH_TENSORRT}."):
        raise MissingPackageError(f"export to tensorrt: found torch-tensorrt {found}. {_INSTALL}")
