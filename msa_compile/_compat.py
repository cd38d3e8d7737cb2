"""Every private import of torch that the package uses, and every import of transformers, in one place.

Each name here has a canary test in ``tests/test_compat.py``: a torch release that moves one turns that test red before
a user meets it.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._C import _set_grad_enabled as set_grad_enabled
from torch._C._functorch import maybe_current_level
from torch._decomp import get_decompositions
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._dynamo.source import ConstantSource
from torch._export.utils import _collect_all_valid_cia_ops_for_aten_namespace, _get_decomp_for_cia
from torch._functorch import predispatch
from torch._guards import TracingContext
from torch._higher_order_ops.flex_attention import flex_attention
from torch._higher_order_ops.wrap import (
    tag_activation_checkpoint,
    wrap_with_autocast,
    wrap_with_set_grad_enabled,
)
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "VMAP_STEPS",
    "WEAK_DYNAMIC",
    "BackendCompilerFailed",
    "ConstantSource",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "ShapeEnv",
    "TensorifyScalarRestartAnalysis",
    "TracingContext",
    "WeakTensorKeyDictionary",
    "cache_of",
    "compile_isolated",
    "compile_package",
    "compiled_module_class",
    "composite_decompositions",
    "cpp_compiler",
    "disable_proxy_modes_tracing",
    "enter_autocast",
    "exit_autocast",
    "flex_attention",
    "get_decompositions",
    "get_proxy_mode",
    "graph_inputs",
    "graphs_in",
    "hub_config",
    "hub_model",
    "is_kept_by_module",
    "is_traceable_wrapper_subclass",
    "lazy_load_decompositions",
    "load_package",
    "lookup_backend",
    "make_fx",
    "maybe_current_level",
    "restore_paths",
    "set_grad_enabled",
    "tag_activation_checkpoint",
    "track_tensor_tree",
    "trains_subclasses",
    "vmap_decrement_nesting",
    "vmap_increment_nesting",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
]

vmap_increment_nesting = predispatch._vmap_increment_nesting
vmap_decrement_nesting = predispatch._vmap_decrement_nesting
lazy_load_decompositions = predispatch.lazy_load_decompositions
# All that a graph from Dynamo writes a vmap out with.
VMAP_STEPS = (
    vmap_increment_nesting,
    vmap_decrement_nesting,
    lazy_load_decompositions,
    predispatch._add_batch_dim,
    predispatch._remove_batch_dim,
)

# Shapes are dynamic, so one model needs few graphs; the limit only has to be out of reach of an honest workload.
_RECOMPILE_LIMIT = 256

# Where `maybe_mark_dynamic` keeps the dimensions of a tensor that it was told of.
WEAK_DYNAMIC = "_dynamo_weak_dynamic_indices"


def compile_isolated(
    function: Callable[..., Any], backend: Callable[..., Any], *, static: bool = False
) -> Callable[..., Any]:
    """``torch.compile`` with a cache of its own, so that two models of one class never share Dynamo's recompile limit.

    torch 2.13 has ``isolate_recompiles`` and ``recompile_limit``; older versions get the isolation of the caller's
    fresh code object alone. With ``static``, every size is a constant of its graph.
    """
    supported = inspect.signature(torch.compile).parameters
    wanted: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": _RECOMPILE_LIMIT}
    options = {name: value for name, value in wanted.items() if name in supported}
    compiled: Callable[..., Any] = torch.compile(
        function, backend=backend, dynamic=False if static else None, **options
    )
    return compiled


def trains_subclasses(model: torch.nn.Module) -> bool:
    """Whether a call now would record gradients of tensor subclasses (DTensor): its sizes must be constants then.

    AOTAutograd's backward over a DTensor with an open length recurses without end, in plain ``torch.compile`` too
    (tried on torch 2.13; inference is sound).
    """
    if not torch.is_grad_enabled():
        return False
    return any(entry.requires_grad and is_traceable_wrapper_subclass(entry) for entry in model.parameters())


def compiled_module_class() -> type[torch.nn.Module]:
    """The class of a module that ``torch.compile`` has wrapped."""
    from torch._dynamo.eval_frame import OptimizedModule

    return OptimizedModule


def composite_decompositions() -> dict[Any, Callable[..., Any]]:
    """What each operator of aten that is made of others is made of."""
    return {op: _get_decomp_for_cia(op) for op in _collect_all_valid_cia_ops_for_aten_namespace()}


def cache_of(layers: list[Any]) -> Any:
    """A cache of transformers that consists of the given layers."""
    from transformers import Cache

    return Cache(layers=layers)


def cpp_compiler() -> str:
    """The command of the C++ compiler that Inductor uses.

    Raises:
        Exception: There is none; Inductor has an error of its own for it.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return str(get_cpp_compiler())


def compile_package(
    program: ExportedProgram, path: Path, functions: Mapping[OpOverload, list[str]], library: str, folder: Path
) -> None:
    """Compile a program as an AOTInductor package.

    Args:
        program: For a CPU.
        path: Of the package, ending in ``.pt2``.
        functions: For each custom operator in it the declaration of the C function that it calls instead.
        library: Name of an archive that has these functions.
        folder: Where the archive lies.
    """
    from torch._inductor import aoti_compile_and_package

    configs = {
        "aot_inductor.custom_ops_to_c_shims": functions,
        # A library is named to the linker; where it lies has no setting of its own.
        "aot_inductor.custom_op_libs": [f"{library} -L{shlex.quote(str(folder))}"],
    }
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def load_package(path: Path) -> Callable[..., Any]:
    """An AOTInductor package, as a function of the arguments of the program that it was compiled from."""
    from torch._inductor import aoti_load_package

    loaded: Callable[..., Any] = aoti_load_package(str(path))
    return loaded


def hub_config(name: str) -> Any:
    """The configuration of a model of the hub, of a local folder, or in a JSON file.

    Raises:
        ImportError: transformers is not installed.
        OSError, ValueError: There is no such model, or transformers does not know its kind.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name)


def hub_model(config: Any, dtype: torch.dtype, *, weights: str | None = None) -> torch.nn.Module:
    """A causal language model of ``config`` whose attention goes through SDPA.

    Args:
        config: Of ``hub_config``.
        dtype: Of the weights.
        weights: Name or folder to load weights from; default random ones.
    """
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    model: torch.nn.Module = (
        AutoModelForCausalLM.from_config(config, **options)
        if weights is None
        else AutoModelForCausalLM.from_pretrained(weights, config=config, **options)
    )
    return model.eval()


def graph_inputs(gm: GraphModule) -> list[tuple[str, object]]:
    """Where each input of a Dynamo graph comes from, as ``"L['self']._parameters['weight']"``, and its value."""
    arguments = [node.meta.get("grapharg") for node in gm.graph.nodes if node.op == "placeholder"]
    return [(_source_name(arg.source), arg.example) for arg in arguments if arg is not None and arg.source is not None]


def _source_name(source: Any) -> str:
    # A method up to torch 2.11, a property since.
    name = source.name
    return str(name() if callable(name) else name)


def graphs_in(gm: GraphModule) -> list[GraphModule]:
    """``gm`` and the bodies of its higher-order operators."""
    return [module for module in gm.modules() if isinstance(module, GraphModule)]


def is_kept_by_module(source: object) -> bool:
    """Whether Dynamo's source of an input, which may be ``None``, is a parameter or buffer of a module."""
    return source is not None and any(mark in _source_name(source) for mark in ("_parameters", "_buffers"))


_INPUT = re.compile(r"^L\['(\w+)'\]((?:\._modules\['[^']+'\])*)\._(?:parameters|buffers)\['[^']+'\]$")
_LOCAL = re.compile(r"^L\['(\w+)'\]")


def restore_paths(gm: GraphModule, model: torch.nn.Module) -> None:
    """Make the module paths in a graph's metadata start at ``model``.

    After a graph break Dynamo captures the frames of inner modules one by one, and each such graph knows its own
    frame's module as ``L['self']`` alone. The parameters and buffers among its inputs tell which module of
    ``model`` that is.

    Args:
        gm: A graph from Dynamo; its ``nn_module_stack`` metadata is corrected in place.
        model: The model that is being captured.
    """
    prefixes = {local: prefix for local, prefix in _frame_prefixes(gm, model).items() if prefix}
    if not prefixes:
        return
    alone = next(iter(prefixes)) if len(prefixes) == 1 else None
    for body in graphs_in(gm):
        for node in body.graph.nodes:
            stack = node.meta.get("nn_module_stack")
            if stack:
                node.meta["nn_module_stack"] = {
                    key: (_LOCAL.sub(lambda found: _rooted(found[1], prefixes), path), kind)
                    for key, (path, kind) in stack.items()
                }
            elif alone is not None and node.op not in ("placeholder", "output"):
                kind = type(model.get_submodule(prefixes[alone]))
                node.meta["nn_module_stack"] = {alone: (_rooted(alone, prefixes), kind)}


def _rooted(local: str, prefixes: Mapping[str, str]) -> str:
    return f"L['{local}'].{prefixes[local]}" if local in prefixes else f"L['{local}']"


def _frame_prefixes(gm: GraphModule, model: torch.nn.Module) -> dict[str, str]:
    """The path of the module that each local variable of the captured frame holds."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                paths.setdefault(id(tensor), []).append(path)
    candidates: dict[str, set[str]] = {}
    for source, value in graph_inputs(gm):
        found = _INPUT.match(source)
        if found is None or id(value) not in paths:
            continue
        tail = ".".join(re.findall(r"\['([^']+)'\]", found[2]))
        fits = {path[: len(path) - len(tail)].rstrip(".") for path in paths[id(value)] if _ends_with(path, tail)}
        candidates[found[1]] = candidates.get(found[1], fits) & fits
    return {local: min(fits, key=len) for local, fits in candidates.items() if fits}


def _ends_with(path: str, tail: str) -> bool:
    return not tail or path == tail or path.endswith("." + tail)
