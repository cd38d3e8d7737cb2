"""Build an engine, run it on the GPU at hand, and write it once it computes what PyTorch does.

Building and running are not yet run: TensorRT was on no machine that this was made on. What comes before is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from msa_compile.config import MSAConfig
from msa_compile.errors import ExampleInputsError, ExportMismatchError
from msa_compile.export.engine.converters import check_converters, converters
from msa_compile.export.engine.lower import Target, lower
from msa_compile.export.engine.profile import profile_of
from msa_compile.export.lint_memory import halved, lint_memory, profiles_of
from msa_compile.export.measure_program import measure_program, size_at
from msa_compile.export.positions import SELECT
from msa_compile.export.records import Port, SparseProgram
from msa_compile.export.sample import samples
from msa_compile.export.write_onnx import Written
from msa_compile.kernels.chip import Chip, chip_of

# Elements of the scores of all blocks, `Tq * Tk / block_size` a group, between two plugins of one launch each: as
# many as 64K tokens and 8 groups have at blocks of 128.
WORKSPACE = 1 << 28
# Of logits, relative to the largest: an engine rounds in other places than PyTorch.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def write_engine(sparse: SparseProgram, path: Path, config: MSAConfig, *, is_python_free: bool) -> Written:
    """Build and check an engine, and write it to ``path``.

    Args:
        sparse: On a CUDA device, in the dtype that the engine shall compute in.
        path: Where to.
        config: Of the sparsified model.
        is_python_free: Whether plugins are PTX in the engine, or ops of this package that it calls.

    Raises:
        ExampleInputsError: The model is on no GPU, or in a dtype that no engine has.
        ExportConverterError: A node has no converter.
        ExportMemoryError: The longest call would not fit.
        ExportMismatchError: The engine computes something else than PyTorch.
    """
    dtype = _dtype_of(sparse)
    device = sparse.example[0].device
    if device.type != "cuda":
        raise ExampleInputsError(
            "an engine is built on the GPU that it is for: model.to('cuda'), and example inputs there, before export"
        )
    chip = chip_of(device)
    program, checks, largest = prepare(sparse, chip, is_python_free=is_python_free)
    path.write_bytes(build(sparse, program, dtype, chip))
    checks += _compare(sparse, path, config, dtype)
    return Written(
        opset=None,
        largest=largest,
        checks=checks,
        not_checked=("other GPUs and other versions of TensorRT than those it was built with",),
        inputs=_renamed(sparse.inputs, [profile.name for profile in profile_of(sparse, program)]),
        outputs=_renamed(sparse.outputs, [f"output{at}" for at in range(len(sparse.outputs))]),
    )


def prepare(sparse: SparseProgram, chip: Chip, *, is_python_free: bool) -> tuple[ExportedProgram, tuple[str, ...], int]:
    """What torch-tensorrt is given, what was checked of it, and the bytes of its largest tensor; needs no TensorRT.

    Args:
        sparse: On any device.
        chip: What launches are compiled for.
        is_python_free: As in `write_engine`.

    Raises:
        ExportConverterError, ExportMemoryError: As `write_engine`.
    """
    program = lower(sparse, Target(is_python_free, chip, _most_keys(sparse)))
    checks = [f"{check_converters(program)} nodes, each with a converter in torch-tensorrt {converters().version}"]
    largest = 0
    for name, sizes in profiles_of(sparse).items():
        whole, half = (measure_program(program, sparse.symbols, at) for at in (sizes, halved(sizes)))
        largest = max(largest, lint_memory(name, whole, half, workspace=WORKSPACE))
        said = ", ".join(f"{key} {size}" for key, size in sizes.items())
        checks.append(f"memory at {name} ({said}): no tensor of Tq x Tk, the largest {largest / 2**20:.0f} MiB")
    return program, tuple(checks), largest


def _most_keys(sparse: SparseProgram) -> int:
    """Keys of the longest call, of any attention."""
    most = {name: allowed.most for name, allowed in sparse.ranges.items()}
    keys = [node.args[1].meta["val"].shape[2] for node in sparse.program.graph.nodes if node.target is SELECT]
    return max(size_at(size, sparse.symbols, most) for size in keys)


def build(sparse: SparseProgram, program: ExportedProgram, dtype: torch.dtype, chip: Chip) -> bytes:
    """The engine of a lowered program. Not yet run.

    Engines are strongly typed: what is float16 or bfloat16 in the model is so in the engine, and nothing else is.
    """
    import torch_tensorrt

    from msa_compile.export.engine.register import register_plugins

    register_plugins(chip)
    given = [
        torch_tensorrt.Input(
            min_shape=each.least,
            opt_shape=each.usual,
            max_shape=each.most,
            dtype=getattr(torch, each.dtype),
            name=each.name,
        )
        if each.is_open
        else torch_tensorrt.Input(shape=each.usual, dtype=getattr(torch, each.dtype), name=each.name)
        for each in profile_of(sparse, program)
    ]
    args, kwargs = _as_called(sparse, given)
    options: dict[str, Any] = {
        # Half products are added up in float32, as PyTorch adds them; bfloat16 ones always are.
        "use_fp32_acc": dtype == torch.float16,
        # TF32 would round what a float32 model computes to ten bits.
        "disable_tf32": dtype == torch.float32,
        "min_block_size": 1,
        "require_full_compilation": True,
    }
    return torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
        program, arg_inputs=args, kwarg_inputs=kwargs, **options
    )


def _as_called(sparse: SparseProgram, flat: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What stands for each tensor, in the structure of the arguments of the program."""
    leaves, spec = pytree.tree_flatten(sparse.program.example_inputs)
    values = iter(flat)
    args, kwargs = pytree.tree_unflatten(
        [next(values) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
    )
    return args, kwargs


def _compare(sparse: SparseProgram, path: Path, config: MSAConfig, dtype: torch.dtype) -> tuple[str, ...]:
    """Run the engine and PyTorch on the same calls. Not yet run."""
    from msa_compile.export.engine.run_engine import Engine

    engine = Engine(path.read_bytes())
    calls, _ = samples(sparse, config.block_size, config.block_size * config.topk_blocks)
    module = sparse.program.module(check_guards=False)
    worst = 0.0
    for call in calls:
        with torch.no_grad():
            expected = pytree.tree_leaves(module(*call.args, **call.kwargs))
        for port, ours, theirs in zip(sparse.outputs, engine(*call.flat), expected, strict=True):
            scale = float(theirs.abs().max().clamp(min=1e-6))
            error = float((ours.double() - theirs.double()).abs().max()) / scale
            worst = max(worst, error)
            if not error <= TOLERANCE[dtype]:
                raise ExportMismatchError(
                    f"{port.name} of the engine is {error:.1e} away from PyTorch at {call}, relative to the largest; "
                    f"{TOLERANCE[dtype]:.0e} is allowed for {dtype}. Nothing was written."
                )
    said = "; ".join(str(call) for call in calls)
    return (f"TensorRT equals PyTorch within {worst:.1e} of the largest at: {said}",)


def _dtype_of(sparse: SparseProgram) -> torch.dtype:
    """The dtype that the model computes in."""
    kinds = {tensor.dtype for tensor in sparse.program.state_dict.values() if tensor.is_floating_point()}
    unknown = kinds - set(TOLERANCE)
    if unknown:
        raise ExampleInputsError(
            f"the model has {unknown.pop()} parameters, which TensorRT has not: use float32, float16 or bfloat16"
        )
    halves = [kind for kind in kinds if kind != torch.float32]
    return max(halves, key=lambda kind: TOLERANCE[kind], default=torch.float32)


def _renamed(ports: tuple[Port, ...], names: list[str]) -> tuple[Port, ...]:
    return tuple(replace(port, name=name) for port, name in zip(ports, names, strict=True))
