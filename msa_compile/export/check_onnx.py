"""Run an ONNX model in onnxruntime and compare it with the program that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from msa_compile.errors import ExportMismatchError
from msa_compile.export.records import SparseProgram, evaluate_size
from msa_compile.export.sample import Sample, samples

# Of the largest value of an output. Half precision rounds elsewhere, and may choose another of two equal blocks.
TOLERANCES = {"float32": 1e-4, "float64": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
# Rows of an output that may be further off: two blocks can score alike to the last digit.
_TIES = 0.01


@dataclass(frozen=True)
class Checked:
    """What was compared and found equal, and what could not be."""

    checks: tuple[str, ...]
    not_checked: tuple[str, ...]


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
        return Checked((), (f"onnxruntime does not load it on a CPU: {_first_line(error)}",))
    module = sparse.program.module(check_guards=False)
    wanted, left_out = samples(sparse, block_size, budget)
    chosen, equal = [], []
    for sample in wanted:
        try:
            with torch.no_grad():
                expected = pytree.tree_leaves(module(*sample.args, **sample.kwargs))
        except Exception as error:
            # Sizes of a model of the user's own may belong together in a way that only it knows.
            left_out = (*left_out, f"{sample}: the model does not take it ({_first_line(error)})")
            continue
        chosen.append(sample)
        equal.append(_compare(session, sparse, sample, expected))
    done = f"onnxruntime {onnxruntime.__version__} on a CPU equals PyTorch at " + "; ".join(
        f"{sample} ({worst:.0e} of the largest value)" for sample, worst in zip(chosen, equal, strict=True)
    )
    return Checked((done,), left_out)


def _compare(session: Any, sparse: SparseProgram, sample: Sample, expected: list[Tensor]) -> float:
    feeds = {port.name: _as_numpy(value) for port, value in zip(sparse.inputs, sample.flat, strict=True)}
    found = session.run(None, feeds)
    worst = 0.0
    for port, ours, theirs in zip(sparse.outputs, expected, found, strict=True):
        theirs = torch.from_numpy(theirs)
        if ours.shape != theirs.shape:
            raise ExportMismatchError(
                f"{port.name} is {list(theirs.shape)} in onnxruntime, {list(ours.shape)} in PyTorch"
            )
        worst = max(worst, _difference(port.name, port.dtype, ours, theirs, sample))
    return worst


def _difference(name: str, dtype: str, ours: Tensor, theirs: Tensor, sample: Sample) -> float:
    if not ours.dtype.is_floating_point:
        if not torch.equal(ours.cpu(), theirs):
            raise ExportMismatchError(f"{name} differs between onnxruntime and PyTorch at {sample}")
        return 0.0
    gap = (ours.cpu().double() - theirs.double()).abs()
    scale = max(float(ours.abs().max()), 1.0) if ours.numel() else 1.0
    rows = gap.flatten(0, -2).amax(-1) if gap.dim() > 1 and gap.numel() else gap.flatten()
    off = rows > TOLERANCES[dtype] * scale
    if not bool(torch.isfinite(rows).all()) or float(off.sum()) > _TIES * len(off):
        raise ExportMismatchError(
            f"{name} is {float(gap.max()):.1e} apart between onnxruntime and PyTorch at {sample}, of values up to "
            f"{scale:.1e}; {int(off.sum())} of {len(off)} rows are off. Nothing was written. "
            "This is a bug of msa_compile."
        )
    return float(gap.max()) / scale if gap.numel() else 0.0


def _as_numpy(value: Tensor) -> Any:
    return value.detach().cpu().numpy()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shapes_of(sparse: SparseProgram, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each input where the open sizes are ``sizes``; a size may be said by others: ``past + length``."""
    return {port.name: tuple(evaluate_size(size, sizes) for size in port.shape) for port in sparse.inputs}
