"""The door of a sparsified model.

It stands where ``forward`` was: it compiles lazily, in a cache of its own, and is opaque to anybody else's
``torch.compile``.
"""

from __future__ import annotations

import abc
import contextlib
import inspect
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from msa_compile._compat import WEAK_DYNAMIC, BackendCompilerFailed, compile_isolated, trains_subclasses
from msa_compile.errors import DataParallelError, ExportNotSparseError, MSAError
from msa_compile.indexer import INDEXER, IndexBranch, remove_index_branches, weights_in_use
from msa_compile.markers import TOKEN, Removed, remove_markers

_trampolines = itertools.count()
_REPLICATE = "_replicate_for_data_parallel"
_OPAQUE = (
    "the forward of a model sparsified by msa_compile compiles itself and is not traced by another compiler: drop "
    "fullgraph=True and strict export around it, or use `with msa_compile.dense(model):`"
)

Backend = Callable[..., Any]


class RefuseReplication:
    """Stands for ``_replicate_for_data_parallel``: a replica would run the original's weights through its door."""

    def __call__(self) -> nn.Module:
        """Refuse."""
        raise DataParallelError(
            "nn.DataParallel copies the module but not its compiled door, so every replica would use the first one's "
            "weights. Use DistributedDataParallel, or unsparsify the model first."
        )


class Door(abc.ABC):
    """The forward of a sparsified model.

    An instance of a module-level class that holds the model: a deep copy or a pickle takes the model along and compiles
    anew, so a copy never runs the original's weights.

    Args:
        module: The model.
        original: ``module.__dict__["forward"]`` as it was, or ``None`` when the class's forward was in use.
    """

    def __init__(self, module: nn.Module, original: Callable[..., Any] | None) -> None:
        self.module = module
        self.original = original
        self._start_cold()

    def _start_cold(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._lock = threading.RLock()
        self.backend: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_compiled", "_lock", "backend")}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        self._start_cold()

    @abc.abstractmethod
    def new_backend(self) -> Backend:
        """The compile backend of this door; asked for once."""

    @abc.abstractmethod
    def before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before each call."""

    @abc.abstractmethod
    def after_call(self) -> None:
        """Runs after each call that returned."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.dense_forward)

    @property
    def __code__(self) -> types.CodeType:
        # torch.export reads where a forward is written before it calls it, and must get as far as our error.
        return type(self).__call__.__code__

    @property
    def dense_forward(self) -> Callable[..., Any]:
        """The forward that the model had before."""
        if self.original is not None:
            return self.original
        return types.MethodType(type(self.module).forward, self.module)

    # Recursive: an outer compiler would otherwise trace the helpers below, one frame each.
    @torch.compiler.disable(reason=_OPAQUE)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model through its own compiled forward."""
        if torch.compiler.is_exporting():
            raise ExportNotSparseError(
                "torch.export of a sparsified model would record the dense model. msa_compile.export(model, path) "
                "writes the sparse one; for the dense one, export inside `with msa_compile.dense(model):`."
            )
        self.before_call(args, kwargs)
        static = trains_subclasses(self.module)
        compiled = self._compiled_for(kwargs, static=static)
        mark_dynamic((args, kwargs), off=static)
        try:
            out = compiled(self.module, *args, **kwargs)
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, MSAError):
                raise failure.inner_exception from failure
            raise
        self.after_call()
        return out

    def _compiled_for(self, kwargs: Mapping[str, Any], *, static: bool) -> Callable[..., Any]:
        """One compiled function for each kind of call, so that the kinds do not use up each other's recompile limit."""
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.module.training, static)
        kind = (*modes, *sorted(kwargs))
        with self._lock:
            if kind not in self._compiled:
                if self.backend is None:
                    self.backend = self.new_backend()
                self._compiled[kind] = compile_isolated(fresh_trampoline(self.original), self.backend, static=static)
            return self._compiled[kind]


def fresh_trampoline(original: Callable[..., Any] | None) -> Callable[..., Any]:
    """A function with a code object of its own: Dynamo keeps its cache and its recompile limit on the code object."""
    if original is None:

        def trampoline(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # The root's own marker: a hook on the root would run before the door does.
            if TOKEN in module._buffers:
                torch.ops.msa.site(module._buffers[TOKEN], "", weights_in_use(module))
            return type(module).forward(module, *args, **kwargs)
    else:

        def trampoline(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if TOKEN in module._buffers:
                torch.ops.msa.site(module._buffers[TOKEN], "", weights_in_use(module))
            return original(*args, **kwargs)

    # A name of its own too: Dynamo remembers by file, line and name which sizes and numbers of a function varied.
    name = f"msa_forward_{next(_trampolines)}"
    code = trampoline.__code__.replace(co_name=name)
    return types.FunctionType(code, globals(), name, trampoline.__defaults__, trampoline.__closure__)


def mark_dynamic(value: Any, *, off: bool = False) -> None:
    """Hint to Dynamo that batch and sequence of every tensor in ``value`` vary; a weak hint, never an error.

    Positions are ``[T]``, token tensors ``[B, T]``, hidden states ``[B, T, C]``, masks ``[B, 1, Tq, Tk]``, cache
    entries ``[B, H, T, D]``. Without it the first two lengths would each cost a compilation.

    Args:
        value: Arguments of a call.
        off: Take the hints away instead; a tensor keeps those of an earlier call.
    """
    for tensor in _tensors(value, depth=5, seen=set()):
        is_float = tensor.dtype.is_floating_point
        open_dims = {1: () if is_float else (0,), 2: (0, 1), 3: (0, 1), 4: (0, 2) if is_float else (0, 2, 3)}
        for dim in open_dims.get(tensor.dim(), ()):
            if off:
                getattr(tensor, WEAK_DYNAMIC, set()).discard(dim)
            elif tensor.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _tensors(value: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in arguments, also inside cache objects, which are no pytrees."""
    for leaf in pytree.tree_leaves(value):
        if id(leaf) in seen:
            continue
        if isinstance(leaf, Tensor):
            if not isinstance(leaf, nn.Parameter):
                yield leaf
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)) and not callable(leaf):
            seen.add(id(leaf))
            yield from _tensors(list(vars(leaf).values()), depth - 1, seen)


@dataclass
class _Pause:
    """A door that is out of its frame, and how many ``with dense(model)`` blocks hold it there."""

    door: Door
    removed: list[Removed]
    branches: list[tuple[nn.Module, IndexBranch]]
    blocks: int = 1


_paused: weakref.WeakKeyDictionary[nn.Module, _Pause] = weakref.WeakKeyDictionary()
_pausing = threading.Lock()


def hang_door(door: Door) -> None:
    """Put a door where its model's ``forward`` was."""
    door.module.__dict__[_REPLICATE] = RefuseReplication()
    door.module.__dict__["forward"] = door


def take_door(door: Door) -> None:
    """Put the ``forward`` that the model had back, take all markers and index branches away: no trace remains."""
    with _pausing:
        _paused.pop(door.module, None)
    _unhang(door)
    remove_markers(door.module)
    remove_index_branches(door.module)


def _unhang(door: Door) -> None:
    door.module.__dict__.pop(_REPLICATE, None)
    door.module.__dict__.pop("forward", None)
    if door.original is not None:
        door.module.__dict__["forward"] = door.original


@contextlib.contextmanager
def paused(door: Door) -> Iterator[None]:
    """The model without its door, markers and index branches for the duration; blocks may nest, also across threads."""
    model = door.module
    with _pausing:
        pause = _paused.get(model)
        if pause is None:
            _unhang(door)
            _paused[model] = _Pause(door, remove_markers(model), remove_index_branches(model))
        else:
            pause.blocks += 1
    try:
        yield
    finally:
        with _pausing:
            pause = _paused.get(model)
            # None when the model was unsparsified inside the block.
            if pause is not None:
                pause.blocks -= 1
                if pause.blocks == 0:
                    restore_parts(model)
                    del _paused[model]
                    hang_door(door)


def restore_parts(model: nn.Module) -> None:
    """Give a paused model its markers and index branches back, and not its door; one that is not paused has none."""
    pause = _paused.get(model)
    if pause is None:
        return
    for marker in pause.removed:
        marker.put_back()
    for module, branch in pause.branches:
        module.register_module(INDEXER, branch)


def door_of(model: nn.Module) -> Door | None:
    """The door of a sparsified model, also while it is paused, or ``None``."""
    door = model.__dict__.get("forward")
    if isinstance(door, Door):
        return door
    pause = _paused.get(model)
    return pause.door if pause is not None else None


def has_traces(model: nn.Module) -> bool:
    """Whether some part of ``model`` is sparsified, though perhaps somebody wrapped the ``forward`` since."""
    return any(door_of(m) is not None or TOKEN in m._buffers or _REPLICATE in m.__dict__ for m in model.modules())
