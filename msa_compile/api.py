"""The verbs of the package: wiring only."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from msa_compile._compat import compiled_module_class
from msa_compile.backend import MSABackend, check_inner, check_strict
from msa_compile.config import MSAConfig
from msa_compile.discover import discover
from msa_compile.errors import (
    AlreadySparseError,
    CaptureError,
    CompiledModelError,
    DataParallelError,
    ExampleInputsError,
    NothingToSparsifyError,
    NotSparseError,
)
from msa_compile.records import GraphRecord
from msa_compile.report import Report, build_report
from msa_compile.runtime import (
    Door,
    RefuseReplication,
    door_of,
    install_markers,
    marker_tokens,
    muted_markers,
    remove_markers,
)

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
_LONG_DUMMY = 8209  # beyond every common sliding window; prime, so that no other size of a model equals it
_REPLICATE = "_replicate_for_data_parallel"


@dataclass
class _State:
    """What a door keeps: copied and pickled with the model."""

    config: MSAConfig
    inner: str
    windows: dict[str, int] = field(default_factory=dict)
    discovered: list[GraphRecord] = field(default_factory=list)


def _make_backend(state: _State) -> MSABackend:
    backend = MSABackend(state.config, state.inner)
    backend.windows = state.windows
    return backend


def sparsify(
    model: Model, config: MSAConfig | None = None, *, example_inputs: Any = None, inner: str = "inductor"
) -> Model:
    """Make the grouped-query attention of ``model`` sparse, in place.

    The model keeps its class, its weights and its interface; only its ``forward`` is now compiled with the ``"msa"``
    backend, which rewrites each attention site that it can prove. Sites that it cannot prove stay dense with a reason, see
    :func:`explain`. Batch and sequence length are dynamic; the first call of each kind (prefill, decode) compiles.

    Args:
        model: Any module whose attention Dynamo can capture.
        config: Block size, budget, which sites; default :class:`MSAConfig()`.
        example_inputs: A dict of keyword arguments, a tuple of positional ones, or one tensor. With them the sites are
            found at once, on fake tensors; without, at the first call (a transformers model brings its own).
        inner: Compiler of the rewritten graph: ``"inductor"``, or ``"aot_eager"`` and ``"eager"`` for debugging.

    Returns:
        ``model`` itself.

    Raises:
        NothingToSparsifyError: No attention site can be made sparse; the message lists what was found.
        SiteRefusedError: With ``strict=True``, some site stays dense.
        AlreadySparseError, CompiledModelError, DataParallelError: The model is in no state to be sparsified.
        ExampleInputsError: ``example_inputs`` do not fit ``model.forward``.
        CaptureError: The model cannot be captured.

    On any error, and on Ctrl-C, the model is as it was.
    """
    config = MSAConfig() if config is None else config
    _check_model(model)
    check_inner(inner)
    state = _State(config, inner)
    for inputs in _candidate_inputs(model, example_inputs):
        try:
            _discover_into(state, model, *inputs)
            break
        except (CaptureError, ExampleInputsError) as error:
            if example_inputs is not None:
                raise
            log.debug("dummy inputs did not fit, trying the next: %s", error)
    original = model.__dict__.get("forward")
    try:
        install_markers(model, _sparse_owners(state))
        model.__dict__[_REPLICATE] = RefuseReplication()
        model.__dict__["forward"] = SparseDoor(model, original, _make_backend, state)
    except BaseException:
        _take_away(model, original)
        raise
    return model


class SparseDoor(Door):
    """A door that finds the sites at the first call, when nobody found them before."""

    state: _State

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found_now = not self.state.discovered and not torch.compiler.is_exporting()
        if found_now:
            try:
                _discover_into(self.state, self.module, args, kwargs)
                install_markers(self.module, _sparse_owners(self.state))
            except CaptureError as error:
                log.debug("fake capture failed, sites are taken from the compiled graph: %s", error)
        out = super().__call__(*args, **kwargs)
        if found_now and not self.state.discovered:
            self.state.discovered = list(self.backend.records)
            _check_found(self.state)
            install_markers(self.module, _sparse_owners(self.state))
        return out


def _discover_into(state: _State, model: nn.Module, args: Any, kwargs: Any) -> None:
    windows = dict(state.windows)
    try:
        records = discover(model, args, kwargs, state.config, windows)
    except TypeError as error:
        raise ExampleInputsError(
            f"{type(model).__name__}.forward cannot be called with the given inputs: {error}. "
            f"Its signature is {inspect.signature(model.forward)}."
        ) from error
    found = _State(state.config, state.inner, windows, records)
    _check_found(found)
    state.windows.update(windows)
    state.discovered = records


def _discover_first(
    model: nn.Module, candidates: list[Any], config: MSAConfig, windows: dict[str, int]
) -> list[GraphRecord]:
    """The records of the first candidate that the model accepts; the last one's error otherwise."""
    for args, kwargs in candidates[:-1]:
        with contextlib.suppress(CaptureError, TypeError):
            return discover(model, args, kwargs, config, windows)
    args, kwargs = candidates[-1]
    return discover(model, args, kwargs, config, windows)


def _check_found(state: _State) -> None:
    sites = [site for record in state.discovered for site in record.sites]
    check_strict(sites, state.config)
    if any(site.decision == "sparse" for site in sites):
        return
    if not sites:
        raise NothingToSparsifyError(
            "no attention was found: no scaled_dot_product_attention and no softmax between two matrix products in the "
            "captured graph. If the model has attention, a custom kernel or a graph break hides it from capture."
        )
    lines = "\n".join(f"  {s.name or '<root>'}: {s.reason.value if s.reason else ''}: {s.detail}" for s in sites)
    raise NothingToSparsifyError(f"{len(sites)} attention sites were found and none can be made sparse:\n{lines}")


def _sparse_owners(state: _State) -> list[str]:
    sites = [site for record in state.discovered for site in record.sites if site.decision == "sparse"]
    return list(dict.fromkeys(site.name.split(":")[0] for site in sites))


def unsparsify(model: Model) -> Model:
    """Give the dense model back, bit for bit, with no trace of this package.

    Raises:
        NotSparseError: The model is not sparsified.
    """
    door = _require_door(model)
    _take_away(model, door.original)
    return model


def _take_away(model: nn.Module, original: Any) -> None:
    model.__dict__.pop(_REPLICATE, None)
    model.__dict__.pop("forward", None)
    if original is not None:
        model.__dict__["forward"] = original
    remove_markers(model)


@contextlib.contextmanager
def dense(model: Model) -> Iterator[Model]:
    """The original model for the duration of the block, for A/B comparison.

    The model is switched in place: calls from other threads meanwhile are dense too.

    Raises:
        NotSparseError: The model is not sparsified.
    """
    door = _require_door(model)
    with muted_markers(model):
        model.__dict__.pop("forward")
        if door.original is not None:
            model.__dict__["forward"] = door.original
        try:
            yield model
        finally:
            model.__dict__["forward"] = door


def explain(model: nn.Module, *args: Any, config: MSAConfig | None = None, **kwargs: Any) -> Report:
    """Say what this package finds in a model and what it does about it; changes nothing.

    Args:
        model: A plain or a sparsified model.
        *args: Arguments of a call to examine, on fake tensors. Without any, a sparsified model reports the graphs that it
            has compiled, and a transformers model is examined on its own dummy inputs.
        config: For a plain model; a sparsified one has its own.
        **kwargs: Keyword arguments of that call.

    Returns:
        A frozen report; ``print`` it.

    Raises:
        ExampleInputsError: Nothing to examine the model with.
        CaptureError: The model cannot be captured.
    """
    door = door_of(model)
    if door is not None and config is not None and config != door.state.config:
        raise AlreadySparseError("the model is sparsified with a config of its own; unsparsify it to examine another")
    used = door.state.config if door is not None else config or MSAConfig()
    counts = {name: int(token.item()) for name, token in marker_tokens(model).items()}
    records = list(door.backend.records) if door is not None and door.backend is not None else []
    if door is not None and not records:
        records = list(door.state.discovered)
    if args or kwargs or not records:
        candidates = [(args, kwargs)] if args or kwargs else _candidate_inputs(model, None)
        if not candidates:
            raise ExampleInputsError(
                f"explain needs the arguments of a call to examine {type(model).__name__}: explain(model, *args, **kwargs)"
            )
        records = _discover_first(model, candidates, used, dict(door.state.windows) if door is not None else {})
    return build_report(records, used, counts, sparsified=door is not None)


def _require_door(model: nn.Module) -> Door:
    door = door_of(model)
    if door is None:
        raise NotSparseError(f"{type(model).__name__} is not sparsified; call msa_compile.sparsify(model) first")
    return door


def _check_model(model: object) -> None:
    if isinstance(model, compiled_module_class()):
        raise CompiledModelError(
            "the model is already wrapped by torch.compile; sparsify the module inside (model._orig_mod), which is then "
            'compiled by sparsify itself, or use torch.compile(module, backend="msa")'
        )
    if not isinstance(model, nn.Module):
        raise CompiledModelError(f"sparsify takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, nn.DataParallel) or getattr(model, "_is_replica", False):
        raise DataParallelError("nn.DataParallel cannot be sparsified: use DistributedDataParallel, or one device")
    if any(door_of(module) is not None for module in model.modules()):
        raise AlreadySparseError(
            f"{type(model).__name__} or a module in it is already sparsified; unsparsify it before another config"
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise CompiledModelError("model.compile() was called on this model; sparsify a model that is not compiled")


def _candidate_inputs(model: nn.Module, given: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of one call to examine: what the user gave, or the dummy inputs that a transformers model brings.

    The dummy inputs are tried long first: on fake tensors length costs nothing, and only beyond its window does a sliding
    window show.
    """
    if isinstance(given, Mapping):
        return [((), dict(given))]
    if isinstance(given, (tuple, list)):
        return [(tuple(given), {})]
    if isinstance(given, torch.Tensor):
        return [((given,), {})]
    if given is not None:
        raise ExampleInputsError(
            f"example_inputs is a {type(given).__name__}; give a dict of keyword arguments, a tuple, or one tensor"
        )
    dummy = getattr(model, "dummy_inputs", None)
    if not isinstance(dummy, Mapping):
        return []
    inputs = dict(dummy)
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or "attention_mask" not in inspect.signature(model.forward).parameters:
        return [((), inputs)]
    # With a mask the model builds its real masks instead of taking the is_causal short cut.
    short = {**inputs, "attention_mask": torch.ones_like(ids)}
    long_ids = ids[:, :1].expand(-1, _LONG_DUMMY).contiguous()
    if set(inputs) != {"input_ids"}:
        return [((), short)]
    return [((), {"input_ids": long_ids, "attention_mask": torch.ones_like(long_ids)}), ((), short)]
