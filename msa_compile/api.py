"""The verbs of the package: wiring only."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn
from torch.export import ExportedProgram

from msa_compile._compat import compiled_module_class
from msa_compile.adapter import warn_of_left_out
from msa_compile.backend import MSABackend, check_inner, check_strict
from msa_compile.calibrate.result import SiteCalibration
from msa_compile.config import MSAConfig
from msa_compile.discover import (
    CallInputs,
    Discovery,
    as_they_select,
    candidate_inputs,
    check_any_sparse,
    discover,
    discover_first,
    insert_index_branches,
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
from msa_compile.kernels.given_mask import biased_calls
from msa_compile.kernels.select_blocks import missed_selections
from msa_compile.markers import install_markers, marker_tokens, tag_frames
from msa_compile.passes.pipeline import run_passes
from msa_compile.report import Report, build_report
from msa_compile.runtime import Door, door_of, hang_door, has_traces, paused, take_door

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model, config: MSAConfig | None = None, *, example_inputs: Any = None, inner: str = "inductor"
) -> Model:
    """Make the grouped-query attention of ``model`` sparse, in place.

    The model keeps its class, its weights and its interface; only its ``forward`` is now compiled with the ``"msa"``
    backend, which rewrites each attention site that it can prove. Sites that it cannot prove stay dense with a reason,
    see :func:`explain`. Batch and sequence length are dynamic; the first call of each kind (prefill, decode) compiles.

    A deep copy and a pickle of the model are sparse too. ``state_dict`` and ``save_pretrained`` hold the plain weights,
    and those of index branches where there are any: what is loaded from them is a dense model, to be sparsified again,
    and :func:`save` and :func:`load` bring its branches back.

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
    make_sparse(model, MSAConfig() if config is None else config, example_inputs, inner)
    warn_of_left_out(model)
    return model


def make_sparse(model: nn.Module, config: MSAConfig, example_inputs: Any, inner: str) -> None:
    """What :func:`sparsify` does, without a word about branches that a checkpoint holds."""
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


class SparseDoor(Door):
    """A door that rewrites, and that finds the sites at the first call when nobody found them before."""

    def __init__(self, module: nn.Module, original: Callable[..., Any] | None, config: MSAConfig, inner: str) -> None:
        super().__init__(module, original)
        self.config = config
        self.inner = inner
        self.discovery = Discovery()
        self.windows: dict[str, int] = {}
        self.expected: set[str] = set()
        self.evaluated = ""
        self.calibrated = ""
        self.calibration: dict[str, SiteCalibration] = {}

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
        if self.config.indexer == "learned":
            insert_index_branches(self.module, discovery)
            discovery = as_they_select(self.module, discovery)
        self.windows.update(discovery.windows)
        self.expected.update(site.name for site in discovery.sites if site.decision == "sparse")
        self.discovery = discovery

    def new_backend(self) -> MSABackend:
        """A backend that knows the model and what was found in it."""
        return MSABackend(self.config, self.inner, model=self.module, windows=self.windows, expected=self.expected)

    @contextlib.contextmanager
    def compiling_with(self, backend: MSABackend) -> Iterator[None]:
        """For the duration calls are compiled anew, with ``backend``; what was compiled before comes back after it."""
        with self._lock:
            kept = self._compiled, self.backend
            self._compiled, self.backend = {}, backend
        try:
            yield
        finally:
            with self._lock:
                self._compiled, self.backend = kept

    def start_over(self, config: MSAConfig) -> None:
        """Forget what was compiled, and compile with another config from now on; sites that it leaves out are dense."""
        with self._lock:
            self.config = config
            self.expected = {name for name in self.expected if config.matches(name)}
            self._compiled, self.backend = {}, None

    def before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forget the index losses of the last call, and find the sites on fake tensors, once."""
        if self.backend is not None:
            self.backend.index_losses.clear()
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
    take_door(require_door(model))
    return model


@contextlib.contextmanager
def dense(model: Model) -> Iterator[Model]:
    """The original model for the duration of the block, for A/B comparison, export or saving.

    The model is switched in place: calls from other threads meanwhile are dense too.

    Raises:
        NotSparseError: The model is not sparsified.
    """
    with paused(require_door(model)):
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
    counts, missed = count_dense_calls(model, door), 0
    records = () if door is None or door.backend is None else tuple(door.backend.records)
    if door is not None:
        records = records or door.discovery.records
        if door.backend is not None:
            number = door.backend.number
            missed = sum(count for (owner, _), count in missed_selections.items() if owner == number)
    if args or kwargs or not records:
        candidates = [CallInputs(args, kwargs)] if args or kwargs else candidate_inputs(model, None)
        if not candidates:
            raise ExampleInputsError(
                f"explain needs the arguments of a call to examine {type(model).__name__}: "
                "explain(model, *args, **kwargs)"
            )
        records = discover_first(model, candidates, used, {} if door is None else door.windows).records
    return build_report(
        records,
        used,
        counts,
        sparsified=door is not None,
        evaluated=door.evaluated if door is not None else "",
        calibrated=door.calibrated if door is not None else "",
        calibration={name: str(site) for name, site in door.calibration.items()} if door is not None else {},
        missed_selections=missed,
    )


def count_dense_calls(model: nn.Module, door: Door | None) -> dict[str, int]:
    """How often sites ran dense although the model is sparsified, by where that was noticed."""
    counts: dict[str, int] = {name: int(token.item()) for name, token in marker_tokens(model).items()}
    if door is not None and door.backend is not None:
        counts["in our graphs"] = door.backend.dense_calls.total()
        number = door.backend.number
        counts["biased masks"] = sum(count for (owner, _), count in biased_calls.items() if owner == number)
    return counts


def require_sparse(model: nn.Module) -> SparseDoor:
    """The door of a model that is sparse now; raise ``NotSparseError`` for any other."""
    door = require_door(model)
    if model.__dict__.get("forward") is not door:
        raise NotSparseError("the model is dense in this `with msa_compile.dense(model)` block; call it outside")
    assert isinstance(door, SparseDoor), "there is one kind of door"
    return door


def require_door(model: nn.Module) -> Door:
    """The door of a sparsified model, also where it is dense for a while; raise ``NotSparseError`` for any other."""
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
