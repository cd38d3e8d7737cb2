"""Register the plugins with TensorRT and torch-tensorrt. Not yet run: TensorRT was on no machine that this was made on.

TensorRT reads the signature of each function, so each is made with the names and annotations of its plugin. Numbers are
annotated as arrays, as torch-tensorrt does it: TensorRT 11.0 cannot make plain ones from what an engine keeps.
torch-tensorrt's own `custom_op` is not used: it gives every output the dtype of the first input, where block ids are
int32, and it cannot hand bfloat16 to torch.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from msa_compile.export.engine.entries import entry_of
from msa_compile.export.engine.plugins import PLUGINS, Plugin
from msa_compile.export.engine.ptx import compile_entry
from msa_compile.kernels.chip import Chip


def register_plugins(chip: Chip) -> None:
    """Make every plugin known, once a process.

    Args:
        chip: What launches are compiled for: that of the GPU at hand.
    """
    from tensorrt.plugin._lib import QDP_REGISTRY
    from torch_tensorrt.dynamo.conversion.plugins import generate_plugin_converter

    for plugin in PLUGINS.values():
        if plugin.id in QDP_REGISTRY:
            continue
        _describe(plugin)
        if plugin.is_python:
            _implement(plugin)
        else:
            _implement_ahead_of_time(plugin, chip)
        generate_plugin_converter(plugin.id, supports_dynamic_shapes=True, use_aot_if_available=not plugin.is_python)


def _describe(plugin: Plugin) -> None:
    """What comes out, in TensorRT's expressions of what goes in."""
    import tensorrt.plugin as trtp

    def describe(*args: Any) -> Any:
        descriptions, numbers = _split(plugin, args)
        shapes = {name: list(each.shape_expr) for name, each in descriptions.items()}
        return tuple(
            trtp.from_shape_expr(tuple(out.shape), _dtype_of(out.dtype, descriptions))
            for out in plugin.outputs(shapes, numbers)
        )

    returns = _tuple_of(trtp.TensorDesc, plugin.results)
    trtp.register(plugin.id)(_with_signature(plugin, describe, trtp.TensorDesc, {}, returns))


def _implement(plugin: Plugin) -> None:
    """What runs while the engine runs: the op of torch, on TensorRT's stream."""
    import tensorrt.plugin as trtp

    def run(*args: Any) -> None:
        *given, outputs, stream = args
        tensors, numbers = _split(plugin, given)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            result = plugin.op(*map(as_torch, tensors.values()), *numbers.values())
            as_torch(outputs[0]).copy_(result)

    rest = {"outputs": _tuple_of(trtp.Tensor, plugin.results), "stream": int}
    trtp.impl(plugin.id)(_with_signature(plugin, run, trtp.Tensor, rest, None))


def _implement_ahead_of_time(plugin: Plugin, chip: Chip) -> None:
    """What an engine holds: PTX, and how many programs of it; no argument but the tensors."""
    import tensorrt.plugin as trtp

    def compiled(*args: Any) -> Any:
        *given, outputs, _ = args
        descriptions, numbers = _split(plugin, given)
        shapes = {name: list(each.shape_expr) for name, each in descriptions.items()}
        dtypes = [_name_of(each.dtype) for each in descriptions.values()]
        item_size = getattr(torch, dtypes[0]).itemsize
        entry = entry_of(plugin, shapes, numbers, item_size, chip)
        made = compile_entry(entry, dtypes, [_name_of(each.dtype) for each in outputs], chip)
        launch = trtp.KernelLaunchParams(
            grid_x=entry.grid[0],
            grid_y=entry.grid[1],
            grid_z=entry.grid[2],
            block_x=made.threads,
            shared_mem=made.shared,
        )
        return made.name, made.ptx, launch, trtp.SymIntExprs(0)

    returns = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    rest = {"outputs": _tuple_of(trtp.TensorDesc, plugin.results), "tactic": int}
    trtp.aot_impl(plugin.id)(_with_signature(plugin, compiled, trtp.TensorDesc, rest, returns))


def _with_signature(
    plugin: Plugin, function: Callable[..., Any], tensor: type, rest: dict[str, Any], returns: Any
) -> Callable[..., Any]:
    """The function under the names and annotations that TensorRT reads."""
    import numpy as np

    arrays = {int: np.ndarray[Any, np.dtype[np.int64]], float: np.ndarray[Any, np.dtype[np.float64]]}
    annotations: dict[str, Any] = dict.fromkeys(plugin.tensors, tensor)
    annotations |= {name: arrays[kind] for name, kind in plugin.numbers.items()}
    annotations |= rest
    # TensorRT hands over everything in place, the stream by its name.
    places = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for name, annotation in annotations.items()
    ]
    signature = inspect.Signature(places, return_annotation=returns)

    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*signature.bind(*args, **kwargs).arguments.values())

    called.__name__ = called.__qualname__ = f"{plugin.name}_{function.__name__}"
    called.__annotations__ = annotations | {"return": returns}
    called.__signature__ = signature  # type: ignore[attr-defined]
    return called


def _tuple_of(kind: type, count: int) -> Any:
    """The annotation of a tuple of so many of a kind; TensorRT reads no ellipsis."""
    return types.GenericAlias(tuple, (kind,) * count)


def _split(plugin: Plugin, args: Sequence[Any]) -> tuple[dict[str, Any], dict[str, int | float]]:
    """Tensors and plain numbers by name."""
    count = len(plugin.tensors)
    pairs = zip(plugin.numbers.items(), args[count:], strict=True)
    numbers = {name: kind(value.reshape(()).item()) for (name, kind), value in pairs}
    return dict(zip(plugin.tensors, args[:count], strict=True)), numbers


def _dtype_of(dtype: str, descriptions: dict[str, Any]) -> Any:
    import tensorrt as trt

    if dtype in descriptions:
        return descriptions[dtype].dtype
    return {"int32": trt.int32, "float32": trt.float32}[dtype]


def _name_of(dtype: Any) -> str:
    """A dtype of TensorRT as torch writes it."""
    import tensorrt as trt

    names = {
        trt.float32: "float32",
        trt.float16: "float16",
        trt.bfloat16: "bfloat16",
        trt.int32: "int32",
        trt.int64: "int64",
        trt.bool: "bool",
    }
    return names[dtype]


class _Bytes:
    """The memory of a tensor of TensorRT as plain integers, which torch takes for every dtype."""

    def __init__(self, tensor: Any, item_size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8"}[item_size],
            "data": (tensor.data_ptr, False),
            "strides": None,
            "version": 3,
        }


def as_torch(tensor: Any) -> torch.Tensor:
    """A tensor of TensorRT, which is contiguous, as one of torch on the same memory; bfloat16 too."""
    dtype: torch.dtype = getattr(torch, _name_of(tensor.dtype))
    return torch.as_tensor(_Bytes(tensor, dtype.itemsize), device="cuda").view(dtype)
