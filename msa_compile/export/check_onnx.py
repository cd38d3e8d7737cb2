"""Run an ONNX model in onnxruntime and compare it with the program that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msa_compile.export.compare import Checked, compare, first_line
from msa_compile.export.records import SparseProgram, evaluate_size
from msa_compile.export.sample import Sample


def check_onnx(path: Path, sparse: SparseProgram, block_size: int, budget: int) -> Checked:
    """Compare at several sizes.

    Raises:
        ExportMismatchError: Some output differs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return Checked((), (f"onnxruntime does not load it on a CPU: {first_line(error)}",))

    def run(sample: Sample) -> list[Tensor]:
        feeds = {port.name: _as_numpy(value) for port, value in zip(sparse.inputs, sample.flat, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, feeds)]

    return compare(f"onnxruntime {onnxruntime.__version__}", run, sparse, block_size, budget)


def _as_numpy(value: Tensor) -> Any:
    return value.detach().cpu().numpy()


def shapes_of(sparse: SparseProgram, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each input where the open sizes are ``sizes``; a size may be said by others: ``past + length``."""
    return {port.name: tuple(evaluate_size(size, sizes) for size in port.shape) for port in sparse.inputs}
