"""Write a sparse program as an AOTInductor package: compiled for this kind of CPU, and complete in itself.

The msa operators are compiled into the package, so it needs torch and nothing of this one. A program is lowered with
these operators as they stand: no tensor of `Tq x Tk` is in it, and none is in the kernels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.operator_schemas import normalize_function
from torch.utils import _pytree as pytree

from msa_compile import _compat
from msa_compile.config import MSAConfig
from msa_compile.errors import CaptureError, ExportFormatError
from msa_compile.export.compare import compare
from msa_compile.export.lint_memory import halved, lint_memory, profiles_of
from msa_compile.export.measure_program import measure_program
from msa_compile.export.onnx_functions import WORKSPACE
from msa_compile.export.package_ops import NAME, build_package_ops, declarations
from msa_compile.export.records import SparseProgram
from msa_compile.export.sample import Sample
from msa_compile.export.to_onnx import check_arguments
from msa_compile.export.write_onnx import Written

# Of operators that a package can hold.
_NAMESPACES = ("aten", "prim", "prims", "msa")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write_aoti(sparse: SparseProgram, path: Path, config: MSAConfig) -> Written:
    """Compile ``path``, and compare what it computes with PyTorch.

    Raises:
        CaptureError: The model has an operator that no package can hold.
        ExportFormatError: The model is not on a CPU, or not in a dtype of the kernels, or nothing can be compiled here.
        ExportMemoryError: The longest call would not fit.
        ExportMismatchError: The package computes something else than PyTorch.
    """
    check_arguments(sparse)
    program = sparse.program
    _check_operands(program)
    largest, checks = 0, []
    for name, sizes in profiles_of(sparse).items():
        whole, half = (measure_program(program, sparse.symbols, at) for at in (sizes, halved(sizes)))
        largest = max(largest, lint_memory(name, whole, half, workspace=WORKSPACE))
        said = ", ".join(f"{key} {size}" for key, size in sizes.items())
        checks.append(f"memory at {name} ({said}): no tensor of Tq x Tk, the largest {largest / 2**20:.0f} MiB")
    _spell_arguments(program)
    folder = build_package_ops()
    try:
        with torch.no_grad():
            _compat.compile_package(program, path, declarations(), NAME, folder)
    except OSError:
        raise
    except Exception as error:
        raise CaptureError(f"AOTInductor could not compile the model: {type(error).__name__}: {error}") from error
    package = _compat.load_package(path)

    def run(sample: Sample) -> list[Tensor]:
        # A static cache is written in place.
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (sample.args, sample.kwargs))
        with torch.no_grad():
            found: list[Tensor] = pytree.tree_leaves(package(*args, **kwargs))
        return found

    checked = compare(f"AOTInductor of torch {torch.__version__}", run, sparse, config.block_size,
                      config.block_size * config.topk_blocks)  # fmt: skip
    not_checked = (*checked.not_checked, "CPUs of another kind than that of this machine")
    return Written(None, largest, (*checks, *checked.checks), not_checked)


def _check_operands(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(node.target, _compat.OpOverload) and node.target.namespace not in _NAMESPACES:
            raise CaptureError(
                f"{node.target} is an operator that a library registered in Python, so a package that calls it would "
                "not run on its own. Let the model do without: an option of its library may choose another way."
            )
        if node.target in declarations() and isinstance(value, Tensor):
            query = node.args[0].meta["val"]
            if query.device.type != "cpu" or query.dtype not in _DTYPES:
                raise ExportFormatError(
                    f"an AOTInductor package holds attention on a CPU, in float32, bfloat16 or float16; {node} is in "
                    f"{query.dtype} on {query.device}. Move the model, or export another format."
                )


def _spell_arguments(program: ExportedProgram) -> None:
    """Give the operators all their arguments in order, as a C function takes them."""
    for node in program.graph.nodes:
        if node.target in declarations():
            spelled = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)
            assert spelled is not None, "an operator has one schema"
            names = [argument.name for argument in node.target._schema.arguments]
            node.args, node.kwargs = tuple(spelled.kwargs[name] for name in names), {}
    program.graph_module.recompile()
