"""The verbs of the package: wiring only."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.export import ExportedProgram

from msa_compile._compat import compiled_module_class
from msa_compile.backend import MSABackend, check_inner, check_strict
from msa_compile.config import MSAConfig
from msa_compile.discover import (
    CallInputs,
    Discovery,
    candidate_inputs,
    check_any_sparse,
    discover,
    discover_first,
    sparse_owners,
)
from msa_compile.errors import (
    AlreadySparseError,
    CaptureError,
    CompiledModelError,
    DataParallelError,
    ExampleInputsError,
    NotAModuleError,
    NotSparseError,
)
from msa_compile.export.export_model import export_model
from msa_compile.export.plan_call import Request
from msa_compile.export.records import Cache, ExportResult
from msa_compile.kernels.given_mask import biased_calls
from msa_compile.passes.pipeline import run_passes
from msa_compile.report import Report, build_report
from msa_compile.runtime import (
    Door,
    door_of,
    hang_door,
    has_traces,
    install_markers,
    marker_tokens,
    paused,
    tag_frames,
    take_door,
)

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model, config: MSAConfig | None = None, *, example_inputs: Any = None, inner: str = "inductor"
) -> Model:
    """Make the grouped-query attention of ``model`` sparse, in place.

    The model keeps its class, its weights and its interface; only its ``forward`` is now compiled with the ``"msa"``
    backend, which rewrites each attention site that it can prove. Sites that it cannot prove stay dense with a reason,
    see :func:`explain`. Batch and sequence length are dynamic; the first call of each kind (prefill, decode) compiles.

    A deep copy and a pickle of the model are sparse too. ``state_dict`` and ``save_pretrained`` hold the plain weights
    and nothing of this package: what is loaded from them is a dense model, to be sparsified again.

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
        NotAModuleError: ``model`` is no module.
        ExampleInputsError: ``example_inputs`` do not fit ``model.forward``.
        CaptureError: The model cannot be captured.

    On any error, and on Ctrl-C, the model is as it was.
    """
    config = MSAConfig() if config is None else config
    _check_model(model)
    check_inner(inner)
    door = SparseDoor(model, model.__dict__.get("forward"), config, inner)
    try:
        for inputs in candidate_inputs(model, example_inputs):
            try:
                door.adopt(discover(model, inputs, config, {}))
                break
            except (CaptureError, ExampleInputsError) as error:
                if example_inputs is not None:
                    raise
                log.debug("dummy inputs did not fit, trying the next: %s", error)
        hang_door(door)
    except BaseException:
        take_door(door)
        raise
    return model


class SparseDoor(Door):
    """A door that rewrites, and that finds the sites at the first call when nobody found them before."""

    def __init__(self, module: nn.Module, original: Callable[..., Any] | None, config: MSAConfig, inner: str) -> None:
        super().__init__(module, original)
        self.config = config
        self.inner = inner
        self.discovery = Discovery()
        self.windows: dict[str, int] = {}
        self.expected: set[str] = set()

    def adopt(self, discovery: Discovery) -> None:
        """Check what was found, and guard it.

        Raises:
            NothingToSparsifyError, SiteRefusedError: It is not enough.
        """
        check_strict(discovery.sites, self.config)
        check_any_sparse(discovery.records)
        if len(discovery.records) > 1:
            tag_frames(self.module)
        install_markers(self.module, discovery.carriers)
        self.windows.update(discovery.windows)
        self.expected.update(site.name for site in discovery.sites if site.decision == "sparse")
        self.discovery = discovery

    def new_backend(self) -> MSABackend:
        """A backend that knows the model and what was found in it."""
        return MSABackend(self.config, self.inner, model=self.module, windows=self.windows, expected=self.expected)

    def before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the sites on fake tensors, once."""
        with self._lock:
            if not self.discovery.records and self.backend is None:
                try:
                    self.adopt(discover(self.module, CallInputs(args, kwargs), self.config, self.windows))
                except CaptureError as error:
                    log.debug("fake capture failed, sites are taken from the compiled graph: %s", error)
                    tag_frames(self.module)

    def after_call(self) -> None:
        """Take the sites from the graphs of the first call, where fake tensors did not do."""
        with self._lock:
            if not self.discovery.records:
                found = Discovery(tuple(self.backend.records))
                self.adopt(replace(found, carriers={owner: owner for owner in sparse_owners(found.sites)}))


def unsparsify(model: Model) -> Model:
    """Give the dense model back, bit for bit, with no trace of this package.

    Raises:
        NotSparseError: The model is not sparsified.
    """
    take_door(_require_door(model))
    return model


@contextlib.contextmanager
def dense(model: Model) -> Iterator[Model]:
    """The original model for the duration of the block, for A/B comparison, export or saving.

    The model is switched in place: calls from other threads meanwhile are dense too.

    Raises:
        NotSparseError: The model is not sparsified.
    """
    with paused(_require_door(model)):
        yield model


def explain(model: nn.Module | ExportedProgram, *args: Any, config: MSAConfig | None = None, **kwargs: Any) -> Report:
    """Say what this package finds in a model and what it does about it; changes nothing.

    Args:
        model: A plain or a sparsified model, or a program that ``torch.export.export`` made of a plain one; the latter
            is examined as it is, without arguments.
        *args: Arguments of a call to examine, on fake tensors. Without any, a sparsified model reports the graphs that
            it has compiled, and a transformers model is examined on its own dummy inputs.
        config: For a plain model; a sparsified one has its own.
        **kwargs: Keyword arguments of that call.

    Returns:
        A frozen report; ``print`` it.

    Raises:
        ExampleInputsError: Nothing to examine the model with, or arguments that do not fit ``model.forward``.
        CaptureError: The model cannot be captured, or the program was decomposed.
        AlreadySparseError: ``config`` is given and the model is sparsified with another one.
    """
    if isinstance(model, ExportedProgram):
        if args or kwargs:
            raise ExampleInputsError("an exported program is examined as it is: explain(program), without arguments")
        config = MSAConfig() if config is None else config
        record = run_passes(model, config, {}, rewrite=False).record
        return build_report([record], config, {}, sparsified=False)
    model = getattr(model, "_orig_mod", model) if isinstance(model, compiled_module_class()) else model
    door = door_of(model)
    assert door is None or isinstance(door, SparseDoor), "there is one kind of door"
    if door is not None and config is not None and config != door.config:
        raise AlreadySparseError("the model is sparsified with a config of its own; unsparsify it to examine another")
    used = door.config if door is not None else config or MSAConfig()
    counts: dict[str, int] = {name: int(token.item()) for name, token in marker_tokens(model).items()}
    records = () if door is None or door.backend is None else tuple(door.backend.records)
    if door is not None:
        records = records or door.discovery.records
        if door.backend is not None:
            counts["in our graphs"] = door.backend.dense_calls.total()
            number = door.backend.number
            counts["biased masks"] = sum(count for (owner, _), count in biased_calls.items() if owner == number)
    if args or kwargs or not records:
        candidates = [CallInputs(args, kwargs)] if args or kwargs else candidate_inputs(model, None)
        if not candidates:
            raise ExampleInputsError(
                f"explain needs the arguments of a call to examine {type(model).__name__}: "
                "explain(model, *args, **kwargs)"
            )
        records = discover_first(model, candidates, used, {} if door is None else door.windows).records
    return build_report(records, used, counts, sparsified=door is not None)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    format: str | None = None,
    dynamic_shapes: Any = None,
    cache: Cache = "none",
    max_length: int | None = None,
) -> ExportResult:
    """Write a sparsified model to a file that runs without this package, its attention sparse.

    The model goes through ``torch.export`` and the same passes as at run time. Every length runs sparse in the
    artifact; up to the budget that is the same attention as dense. Nothing is written unless all checks are passed.

    Args:
        model: A sparsified model; it is not changed.
        path: Where to; the suffix says the format.
        example_inputs: A dict of keyword arguments, a tuple of positional ones, or one tensor; a transformers model
            brings its own.
        format: ``"onnx"``; default by the suffix.
        dynamic_shapes: Open sizes as ``torch.export.export`` takes them, each with its range; default batch and length
            of the first input. For a transformers decoder those of ``input_ids`` are enough.
        cache: ``"none"``: what the model takes and returns is what the artifact takes and returns. For a transformers
            decoder also ``"explicit"``: keys and values of each layer go in and come out longer; and ``"static"``: they
            are buffers of ``max_length``, each row written at its ``position``. Both return the logits of the last
            token, and do prefill and decode in one artifact.
        max_length: The longest call, prompt and new tokens together; default ``config.max_position_embeddings``.

    Returns:
        What was written and what was checked; ``print`` it.

    Raises:
        NotSparseError: The model is not sparsified.
        ExportFormatError, ExportPackageError, ExportCacheError: What was asked for is not there.
        ExampleInputsError: Inputs that do not fit, or lie outside the range of an open size.
        CaptureError, ExportNotSparseError: The model cannot be captured, or not all of its sparse sites.
        ExportMemoryError: The longest call would make a tensor of ``Tq x Tk``, or one above the bound.
        ExportMismatchError, ExportWriteError: The artifact is wrong, or cannot be written.
    """
    door = _require_door(model)
    assert isinstance(door, SparseDoor), "there is one kind of door"
    candidates = candidate_inputs(model, example_inputs)
    if not candidates:
        raise ExampleInputsError(f"export needs example_inputs for {type(model).__name__}")
    inputs = candidates[-1]
    if not door.discovery.records:
        door.before_call(inputs.args, dict(inputs.kwargs))
    with paused(door):
        request = Request(
            model=model,
            args=inputs.args,
            kwargs=inputs.kwargs,
            config=door.config,
            windows=door.windows,
            sites=tuple(door.discovery.sites),
            dynamic_shapes=dynamic_shapes,
            cache=cache,
            max_length=max_length,
        )
        return export_model(request, Path(path), format)


def _require_door(model: nn.Module) -> Door:
    door = door_of(model)
    if door is not None and model.__dict__.get("forward", door) is door:
        return door
    if isinstance(model, compiled_module_class()):
        raise NotSparseError("this is what torch.compile made; give the module inside, model._orig_mod")
    if has_traces(model):
        raise NotSparseError(
            f"{type(model).__name__} is sparsified in part, or its forward was wrapped since: give the part that was "
            "sparsified, and take the wrapper off first"
        )
    raise NotSparseError(f"{type(model).__name__} is not sparsified; call msa_compile.sparsify(model) first")


def _check_model(model: object) -> None:
    if isinstance(model, compiled_module_class()):
        raise CompiledModelError(
            "the model is already wrapped by torch.compile; sparsify the module inside (model._orig_mod), which is "
            'then compiled by sparsify itself, or use torch.compile(module, backend="msa")'
        )
    if not isinstance(model, nn.Module):
        raise NotAModuleError(f"sparsify takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, nn.DataParallel) or getattr(model, "_is_replica", False):
        raise DataParallelError("nn.DataParallel cannot be sparsified: use DistributedDataParallel, or one device")
    if has_traces(model):
        raise AlreadySparseError(
            f"{type(model).__name__} or a module in it is already sparsified; unsparsify it before another config"
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise CompiledModelError("model.compile() was called on this model; sparsify a model that is not compiled")
