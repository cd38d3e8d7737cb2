"""Every private import of torch that the package uses, in one place.

Each name here has a canary test in ``tests/test_compat.py``: a torch release that moves one turns that test red before
a user meets it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import TracingContext
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "BackendCompilerFailed",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "ShapeEnv",
    "TracingContext",
    "compile_isolated",
    "compiled_module_class",
    "disable_proxy_modes_tracing",
    "get_proxy_mode",
    "is_traceable_wrapper_subclass",
    "lookup_backend",
    "make_fx",
    "tag_activation_checkpoint",
    "track_tensor_tree",
    "unset_fake_temporarily",
]

# Shapes are dynamic, so one model needs few graphs; the limit only has to be out of reach of an honest workload.
_RECOMPILE_LIMIT = 256


def compile_isolated(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` with a cache of its own, so that two models of one class never share Dynamo's recompile limit.

    torch 2.13 has ``isolate_recompiles`` and ``recompile_limit``; older versions get the isolation of the caller's
    fresh code object alone.
    """
    supported = inspect.signature(torch.compile).parameters
    wanted: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": _RECOMPILE_LIMIT}
    options = {name: value for name, value in wanted.items() if name in supported}
    compiled: Callable[..., Any] = torch.compile(function, backend=backend, dynamic=None, **options)
    return compiled


def compiled_module_class() -> type[torch.nn.Module]:
    """The class of a module that ``torch.compile`` has wrapped."""
    from torch._dynamo.eval_frame import OptimizedModule

    return OptimizedModule
