"""The door of a sparsified model and the markers that tell when a call went around it.

The door stands where ``forward`` was: it compiles lazily, in a cache of its own, and is opaque to anybody else's
``torch.compile``. Each module that owns an attention site has a marker, a forward pre-hook that calls ``msa::site``. The
``"msa"`` backend erases it; where it executes, that call was dense, and it says so.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from msa_compile._compat import BackendCompilerFailed, compile_isolated
from msa_compile.errors import DataParallelError, ExportNotSparseError, MSAError

log = logging.getLogger(__name__)

TOKEN = "_msa_dense_calls"

Backend = Callable[..., Any]


@torch.library.custom_op("msa::site", mutates_args=("token",))
def site(token: Tensor, name: str) -> None:
    """Count a dense call of an attention site that was made sparse; warn at the first.

    Args:
        token: int64 ``[1]``, the counter; changed in place, so that no compiler drops the call.
        name: Module path of the site.
    """
    token.add_(1)
    if token.item() == 1:
        log.warning(
            "%s ran DENSE although the model is sparsified: this call did not go through the model's own forward "
            "(an inner module was called, a graph break cut the attention, or the model was copied without its door). "
            "Call the sparsified model itself, or use `with msa_compile.dense(model):` if dense was meant.",
            name,
        )


@site.register_fake
def _(token: Tensor, name: str) -> None:
    return None


class SiteMarker:
    """Forward pre-hook that reports a dense call of its module. Picklable, and copied with its module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: Any) -> None:
        torch.ops.msa.site(module._buffers[TOKEN], self.name)


class RefuseReplication:
    """Stands for ``_replicate_for_data_parallel``: a replica would run the original's weights through its door."""

    def __call__(self) -> nn.Module:
        raise DataParallelError(
            "nn.DataParallel copies the module but not its compiled door, so every replica would use the first one's "
            "weights. Use DistributedDataParallel, or unsparsify the model first."
        )


class Door:
    """The forward of a sparsified model.

    An instance of a module-level class that holds the model: a deep copy or a pickle takes the model along and compiles
    anew, so a copy never runs the original's weights.

    Args:
        module: The model.
        original: ``module.__dict__["forward"]`` as it was, or ``None`` when the class's forward was in use.
        backend: Makes the compile backend, called with ``state``.
        state: What the backend and the report need; copied and pickled with the door.
    """

    def __init__(
        self, module: nn.Module, original: Callable[..., Any] | None, backend: Callable[[Any], Backend], state: Any
    ) -> None:
        self.module = module
        self.original = original
        self.make_backend = backend
        self.state = state
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.backend: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "original": self.original,
            "make_backend": self.make_backend,
            "state": self.state,
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        self._compiled = {}
        self.backend = None

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.dense_forward)

    @property
    def dense_forward(self) -> Callable[..., Any]:
        """The forward that the model had before."""
        if self.original is not None:
            return self.original
        return types.MethodType(type(self.module).forward, self.module)

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            raise ExportNotSparseError(
                "torch.export of a sparsified model would record the dense model. To export the dense model on purpose, "
                "export inside `with msa_compile.dense(model):`."
            )
        compiled = self._compiled_for(args, kwargs)
        mark_dynamic((args, kwargs))
        try:
            return compiled(self.module, *args, **kwargs)
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, MSAError):
                raise failure.inner_exception from failure
            raise

    def _compiled_for(self, args: Any, kwargs: Any) -> Callable[..., Any]:
        """One compiled function for each kind of call, so that the kinds do not use up each other's recompile limit."""
        kind = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.module.training, *sorted(kwargs))
        if kind not in self._compiled:
            if self.backend is None:
                self.backend = self.make_backend(self.state)
            self._compiled[kind] = compile_isolated(_fresh_trampoline(self.original), self.backend)
        return self._compiled[kind]


def _fresh_trampoline(original: Callable[..., Any] | None) -> Callable[..., Any]:
    """A function with a code object of its own: Dynamo keeps its cache and its recompile limit on the code object."""
    if original is None:

        def trampoline(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return type(module).forward(module, *args, **kwargs)
    else:

        def trampoline(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

    return types.FunctionType(
        trampoline.__code__.replace(co_name="msa_forward"),
        globals(),
        "msa_forward",
        trampoline.__defaults__,
        trampoline.__closure__,
    )


def mark_dynamic(value: Any) -> None:
    """Hint to Dynamo that batch and sequence of every tensor in ``value`` vary; a weak hint, never an error.

    Token tensors are ``[B, T]``, hidden states ``[B, T, C]``, masks ``[B, 1, Tq, Tk]`` and cache entries ``[B, H, T, D]``.
    Without it the first two lengths would each cost a compilation.
    """
    for tensor in _tensors(value, depth=5):
        dims = {2: (0, 1), 3: (0, 1), 4: (0, 2, 3) if not tensor.dtype.is_floating_point else (0, 2)}.get(tensor.dim())
        for dim in dims or ():
            if tensor.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    """Tensors in arguments, also inside cache objects, which are no pytrees."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            if not isinstance(leaf, nn.Parameter):
                yield leaf
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)) and not callable(leaf):
            yield from _tensors(list(vars(leaf).values()), depth - 1)


def install_markers(model: nn.Module, names: Iterable[str]) -> None:
    """Put a marker on each named module that has none.

    The root needs none: its forward is the door, and a hook on it would run before the door does.
    """
    for name in names:
        module = model.get_submodule(name)
        if name and TOKEN not in module._buffers:
            module.register_buffer(TOKEN, torch.zeros(1, dtype=torch.int64), persistent=False)
            module.register_forward_pre_hook(SiteMarker(name))


def marker_tokens(model: nn.Module) -> dict[str, Tensor]:
    """The dense-call counter of each marked module."""
    return {name: module._buffers[TOKEN] for name, module in model.named_modules() if TOKEN in module._buffers}  # type: ignore[misc]


def remove_markers(model: nn.Module) -> None:
    """Take every marker and counter away, and leave no trace."""
    for module in model.modules():
        if TOKEN not in module._buffers:
            continue
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, SiteMarker):
                del module._forward_pre_hooks[key]
        del module._buffers[TOKEN]
        module._non_persistent_buffers_set.discard(TOKEN)


@contextlib.contextmanager
def muted_markers(model: nn.Module) -> Iterator[None]:
    """Take the marker hooks away for the duration, and put each back where it was."""
    hooked = [(module, dict(module._forward_pre_hooks)) for module in model.modules() if TOKEN in module._buffers]
    for module, hooks in hooked:
        for key, hook in hooks.items():
            if isinstance(hook, SiteMarker):
                del module._forward_pre_hooks[key]
    try:
        yield
    finally:
        for module, hooks in hooked:
            for key, hook in hooks.items():
                module._forward_pre_hooks[key] = hook


def door_of(model: nn.Module) -> Door | None:
    """The door of a sparsified model, or ``None``."""
    door = model.__dict__.get("forward")
    return door if isinstance(door, Door) else None
