"""The verbs of the package: wiring only."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.export import ExportedProgram

from msa_compile._compat import compiled_module_class
from msa_compile.adapter import check_adapter, insert_adapter, read_adapter, write_adapter
from msa_compile.backend import BudgetBackend, MSABackend, check_inner, check_strict
from msa_compile.config import MSAConfig
from msa_compile.discover import (
    CallInputs,
    Discovery,
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
from msa_compile.evaluate.budget import BudgetTask, fit
from msa_compile.evaluate.compare import check_edges, default_edges
from msa_compile.evaluate.fitted import BudgetFit
from msa_compile.evaluate.probes import ProbePlan, check_plan
from msa_compile.evaluate.result import Evaluation
from msa_compile.evaluate.run import Pair, evaluate_pair
from msa_compile.kernels.given_mask import biased_calls
from msa_compile.kernels.select_blocks import missed_selections
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
        self.evaluated = ""

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


def save(model: nn.Module, folder: str | Path) -> None:
    """Save the index branches of a sparsified model, and what they belong to; the base is not saved.

    Args:
        model: Sparsified, with a learned indexer at some site.
        folder: Made if it is not there; an adapter in it is replaced.

    Raises:
        NotSparseError: The model is not sparsified.
        AdapterError: It has no index branch, or safetensors is not installed.
    """
    door = _require_door(model)
    assert isinstance(door, SparseDoor), "there is one kind of door"
    write_adapter(model, door.config, folder)


def load(model: Model, folder: str | Path, *, example_inputs: Any = None) -> Model:
    """Give a model the index branches of a folder that :func:`save` wrote.

    Args:
        model: With the base that the adapter was saved from. A plain model is sparsified with the saved config; one
            that is sparsified keeps its own.
        folder: The adapter.
        example_inputs: As in :func:`sparsify`, for a plain model.

    Returns:
        ``model`` itself.

    Raises:
        AdapterError: The folder is no adapter, is damaged or of an unknown schema, or belongs to another model; the
            model is as it was, unless a branch in it does not fit.
    """
    adapter = read_adapter(folder)
    door = door_of(model)
    check_adapter(adapter, model)
    if door is None:
        sparsify(model, adapter.config, example_inputs=example_inputs)
        door = door_of(model)
    assert isinstance(door, SparseDoor), "there is one kind of door"
    insert_adapter(adapter, model, is_forced=door.config.indexer == "learned")
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
    counts, missed = _dense_calls(model, door), 0
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
    evaluated = door.evaluated if door is not None else ""
    return build_report(
        records, used, counts, sparsified=door is not None, evaluated=evaluated, missed_selections=missed
    )


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    probe_lengths: Sequence[int] = (),
    probe_samples: int = 8,
    tokenizer: Any = None,
    position_edges: Sequence[int] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Evaluation:
    """Compare the sparse model with the dense one on your data; ``print`` the result, or ``plot`` it.

    Both are called on every batch, in eval mode and without gradients; the model is left as it was, on errors and on
    Ctrl-C too. What counts is the next token of every token that is not padding: of the ids themselves, or of
    ``labels``, where -100 does not count. Memory: the dense logits of one batch are kept in main memory beside the
    sparse ones, in the model's own dtype.

    Args:
        model: A sparsified model.
        batches: Dicts of keyword arguments, tuples of positional ones, or tensors of token ids; any iterable.
        probe_lengths: Tokens of the prompts in which a needle, one of many needles and a chain of variables have to be
            found again; none is no probes.
        probe_samples: Prompts of each probe and length.
        tokenizer: Something with ``encode(text)``, for probes in English; without it they are made of token ids alone,
            and measure whether the model repeats what it saw once in your text.
        position_edges: Positions at which a row of the table starts; default: the budget, and then doubling.
        progress: Whether a bar is shown, where tqdm is installed.
        seed: Of what the probes hide, and where.

    Raises:
        NotSparseError: The model is not sparsified, or is dense in a ``with dense(model)`` block.
        BatchError, EmptyDataError: The batches will not do.
        NoLogitsError, NonFiniteError: What the model returns will not do.
        EvaluateArgumentError: A number is outside its legal range.
    """
    door = _require_sparse(model)
    budget = door.config.topk_blocks * door.config.block_size
    edges = default_edges(budget) if position_edges is None else check_edges(position_edges)
    plan = check_plan(ProbePlan(tuple(probe_lengths), probe_samples, tokenizer, seed))
    evaluation = evaluate_pair(_pair(model, door), batches, edges, plan, progress=progress)
    door.evaluated = evaluation.headline
    return evaluation


def fit_budget(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_nll_increase: float,
    candidates: Sequence[int] | None = None,
    progress: bool = True,
) -> BudgetFit:
    """Find the fewest blocks a layer that keep the loss on your data within a bar; layers may stay dense.

    First every layer alone is tried with every candidate, the others dense. Then budgets are taken away where that
    costs least for the keys that it saves, as far as the bar allows; what is returned was measured as it is. Calls are
    sparse however short they are (``dense_below=0``), and only captured, not compiled further. The model is left as it
    was: apply the result with ``sparsify(unsparsify(model), fit.config)``.

    Args:
        model: A sparsified model; its other settings stay.
        batches: As for :func:`evaluate`; they are gone through about once for each layer and candidate, so a few will
            do. They have to be longer than the budgets to try.
        max_nll_increase: The bar: mean negative log-likelihood may rise by that much, in nats a token.
        candidates: Blocks a query to try; default: powers of two below what the longest batch has.
        progress: Whether a bar is shown, where tqdm is installed.

    Returns:
        The config, the budget of each layer, and the frontier; ``print`` or ``plot`` it.

    Raises:
        BudgetNotMetError: No candidate keeps the bar in any layer.
        EvaluateArgumentError: A number is outside its legal range, or the batches are too short to choose.
        NotSparseError, BatchError, EmptyDataError, NoLogitsError, NonFiniteError: As for :func:`evaluate`.
    """
    door = _require_sparse(model)
    backend = BudgetBackend(door.config, model, door.windows, door.expected)
    task = BudgetTask(
        pair=_pair(model, door),
        trying=lambda: door.compiling_with(backend),
        set_budgets=backend.set_budgets,
        sites=lambda: tuple(site for record in backend.records for site in record.sites if site.decision == "sparse"),
    )
    return fit(task, batches, max_nll_increase, candidates, progress=progress)


def _pair(model: nn.Module, door: SparseDoor) -> Pair:
    def dense_below() -> int:
        sites = [site for record in door.backend.records for site in record.sites] if door.backend else []
        return max((site.dense_below.keys for site in sites if site.dense_below), default=0)

    return Pair(model, door.config, lambda: dense(model), lambda: sum(_dense_calls(model, door).values()), dense_below)


def _dense_calls(model: nn.Module, door: Door | None) -> dict[str, int]:
    """How often sites ran dense although the model is sparsified, by where that was noticed."""
    counts: dict[str, int] = {name: int(token.item()) for name, token in marker_tokens(model).items()}
    if door is not None and door.backend is not None:
        counts["in our graphs"] = door.backend.dense_calls.total()
        number = door.backend.number
        counts["biased masks"] = sum(count for (owner, _), count in biased_calls.items() if owner == number)
    return counts


def _require_sparse(model: nn.Module) -> SparseDoor:
    door = _require_door(model)
    if model.__dict__.get("forward") is not door:
        raise NotSparseError("the model is dense in this `with msa_compile.dense(model)` block; call it outside")
    assert isinstance(door, SparseDoor), "there is one kind of door"
    return door


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
