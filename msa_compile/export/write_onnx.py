"""Write a sparse program as ONNX, and see that the file is right: well formed, within memory, equal to PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msa_compile.config import MSAConfig
from msa_compile.errors import ExportMemoryError
from msa_compile.export.lint_memory import halved, lint_live, lint_memory, profiles_of
from msa_compile.export.records import Port, SparseProgram

# A protobuf holds 2 GiB; weights beyond this lie in a file beside it.
EXTERNAL_ABOVE = 1 << 30


@dataclass(frozen=True)
class Written:
    """What is known of an artifact that was written; inputs and outputs where they are not those of the program."""

    opset: int | None
    largest: int
    checks: tuple[str, ...]
    not_checked: tuple[str, ...]
    inputs: tuple[Port, ...] | None = None
    outputs: tuple[Port, ...] | None = None


def write_onnx(sparse: SparseProgram, path: Path, config: MSAConfig) -> Written:
    """Write ``path``, and weights beside it if they are big; then check what was written.

    Raises:
        ExportMemoryError: The longest call would not fit.
        ExportMismatchError: onnxruntime computes something else than PyTorch.
    """
    import onnx
    import onnx_ir

    from msa_compile.export.check_onnx import check_onnx, shapes_of
    from msa_compile.export.measure_onnx import UnknownSizeError, measure_onnx
    from msa_compile.export.onnx_functions import WORKSPACE
    from msa_compile.export.to_onnx import to_onnx

    model, opset = to_onnx(sparse)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in sparse.program.state_dict.values())
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if weights > EXTERNAL_ABOVE else None)
    onnx.checker.check_model(str(path), full_check=True)
    checks = [f"onnx.checker, full, opset {opset}"]
    largest = 0
    proto = onnx.load(path, load_external_data=False)
    for name, sizes in profiles_of(sparse).items():
        try:
            whole, half = (measure_onnx(proto, shapes_of(sparse, at)) for at in (sizes, halved(sizes)))
        except UnknownSizeError as error:
            raise ExportMemoryError(
                f"the size of a tensor is not known at {name} ({sizes}): {error}. So nobody can say that it fits. If "
                "these sizes do not go together, give dynamic_shapes ranges whose ends do."
            ) from error
        largest = max(largest, lint_memory(name, whole, half, workspace=WORKSPACE))
        at_once = lint_live(name, whole)
        said = ", ".join(f"{key} {size}" for key, size in sizes.items())
        checks.append(
            f"memory at {name} ({said}): no tensor of Tq x Tk, the largest {largest / 2**20:.0f} MiB, "
            f"{at_once / 2**20:.0f} MiB at once"
        )
    checked = check_onnx(path, sparse, config.block_size, config.block_size * config.topk_blocks)
    not_checked = (*checked.not_checked, "TensorRT and other runtimes than onnxruntime")
    return Written(opset, largest, (*checks, *checked.checks), not_checked)
