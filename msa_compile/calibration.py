"""The verbs that train index branches: wiring only."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from msa_compile.adapter import fingerprint
from msa_compile.api import SparseDoor, dense, require_sparse
from msa_compile.backend import MSABackend, ObservingBackend
from msa_compile.batches import quiet
from msa_compile.calibrate.feed import Batches, Call, make_feed
from msa_compile.calibrate.metrics import SiteMetrics
from msa_compile.calibrate.result import Bars, CalibrationResult, SiteCalibration
from msa_compile.calibrate.shards import add_over_processes, check_mesh, processes
from msa_compile.calibrate.train import Run, Task, Trained
from msa_compile.config import MSAConfig
from msa_compile.discover import CallInputs, Discovery, as_they_select, discover, insert_index_branches
from msa_compile.errors import (
    BatchError,
    CalibrateArgumentError,
    CaptureError,
    EmptyDataError,
    NoIndexLossError,
    NoLogitsError,
    NothingToCalibrateError,
)
from msa_compile.evaluate.probes import ProbePlan
from msa_compile.evaluate.run import Pair, evaluate_pair
from msa_compile.examine import examine
from msa_compile.indexer import INDEXER, IndexBranch
from msa_compile.runtime import door_of

STAGES = ("select", "align", "sparse")


def calibrate(
    model: nn.Module,
    data: Iterable[Any] | Callable[[nn.Module], Any],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    stage: Literal["select", "align", "sparse"] = "select",
    max_length: int | None = None,
    min_mass_ratio: float = 0.95,
    min_found: float = 0.98,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    seed: int = 0,
) -> CalibrationResult:
    """Train the index branches of a sparsified model on your text, and use those that are good enough.

    The base is frozen. Each branch learns to score keys as its layer's attention weighs them: the loss is the
    divergence of its scores from the mean attention of a group's heads. The first batches are held out, and on them
    each site is compared with the best blocks there are: where the selected ones hold less than `min_mass_ratio` of
    the attention that the best ones hold, or where more queries than with `"keys"` miss a far block that holds much
    (`min_found`), the site keeps `"keys"`, or is dense with `MSAConfig(fallback="dense")`. Sites without a branch get
    one, under `indexer="auto"` too; branches of an earlier calibration learn on.

    On an error the model is as it was. Ctrl-C ends the training and keeps what it did. In several processes (torchrun)
    each has its own share of the data, and they learn as one; the gradients of the branches are all that is exchanged.

    Args:
        model: A sparsified model.
        data: Dicts of keyword arguments, tuples of positional ones, or tensors of token ids: batches of text that is
            longer than the budget; any iterable, gone through again when it ends. Or a function that calls the model
            it is given, however it likes. Padding (`attention_mask`) takes no part, and documents that are packed into
            a row are told apart as attention tells them apart.
        steps: Batches to learn from, one step each.
        learning_rate: Of Adam; it warms up, and falls along a cosine to a tenth.
        stage: What is compared. `"select"`: what selection decides. Blocks that are selected anyway (a query's own) are
            left out, a query counts by the attention that it gives to the others, and scores learn the squares of
            attention's probabilities, in which the largest rule. `"align"`: the paper's warm-up, all that a query sees
            and attention as it is. Both are of a model that runs dense. `"sparse"`: the paper's later loss, attention
            on the blocks that the branches select, of a model that runs sparse; it comes after one of the others, and
            for training the base too see :func:`index_loss`.
        max_length: Tokens of a row at most; the rest is cut off.
        min_mass_ratio: The bar for attention mass, 0 to 1.
        min_found: The bar for finding, 0 to 1: of the queries that give a fifth of their attention or more to one block
            farther than a window of the same budget reaches, some select it: as many as with `"keys"` times this, at
            least. Lost facts show here, if the data ask for facts; in masses, which are mostly near, they do not.
        checkpoint: A file that keeps the state about every half minute. A run that was killed goes on from there, to
            the same result, when it is started again with the same arguments.
        progress: Whether a bar is shown, where tqdm is installed.
        seed: Of new branches, and of what a DataLoader shuffles.

    Returns:
        What was found and decided; `print` it, or `plot` it.

    Raises:
        NotSparseError: The model is not sparsified, or is dense in a `with dense(model)` block.
        CalibrateArgumentError: A number or name is outside its legal range, or the model has `indexer="keys"`.
        NothingToCalibrateError: No site can have an index branch.
        BatchError, EmptyDataError: The data will not do, or is not longer than the budget.
        NonFiniteError: The base, or the loss, is NaN or infinite on some batch.
        CheckpointError: The checkpoint is damaged, or of another run.
    """
    door = require_sparse(model)
    bars = Bars(min_mass_ratio, min_found)
    _check_arguments(door, steps, learning_rate, stage, bars, max_length)
    path = None if checkpoint is None else Path(checkpoint)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        with quiet(model):
            feed = make_feed(model, data, max_length)
            example = feed.first()
            branches, keeper, kept_own = _prepare(model, door, example)
        try:
            said = {
                "steps": steps,
                "learning_rate": learning_rate,
                "stage": stage,
                "seed": seed,
                "sites": list(branches),
                "base": fingerprint(model),
                "config": str(asdict(door.config)),
                "processes": processes(),
            }
            is_split = check_mesh(model)
            if is_split and path is not None:
                raise CalibrateArgumentError("there are no checkpoints where attention heads are split over processes")
            observing = _observing(model, door, is_sparse=stage == "sparse")
            task = Task(
                model=model,
                config=door.config,
                branches=branches,
                feed=feed,
                watching=observing,
                steps=steps,
                learning_rate=learning_rate,
                stage=stage,
                is_split=is_split,
                said=said,
                checkpoint=path,
                progress=progress,
            )
            trained = Run(task, keeper.give_dtypes_back).run()
        except BaseException:
            keeper.undo()
            raise
        sites = _decide(model, door, example, branches, trained, bars)
        notes = (*kept_own, *feed.notes)
        result = _result(door, sites, trained, stage, learning_rate, bars, notes, steps)
        if isinstance(feed, Batches):
            result = _with_nll(model, door, result, feed)
    door.calibrated = result.headline
    door.calibration = {site.name: site for site in sites}
    return result


@dataclass
class _Keeper:
    """What the branches were before, to be given back where that is due."""

    model: nn.Module
    branches: Mapping[str, IndexBranch]
    inserted: list[nn.Module]
    weights: dict[str, list[Tensor]]
    flags: dict[str, tuple[bool, bool]]
    dtypes: dict[str, torch.dtype]
    requires: dict[str, bool]

    def give_dtypes_back(self) -> None:
        """The branches in the dtype of the base, as they are used, without gradients."""
        for name, branch in self.branches.items():
            branch.to(self.dtypes[name])
            branch.requires_grad_(self.requires[name])
            branch.zero_grad(set_to_none=True)

    def undo(self) -> None:
        """The model as it was."""
        self.give_dtypes_back()
        for name, branch in self.branches.items():
            for parameter, kept in zip(branch.parameters(), self.weights[name], strict=True):
                parameter.data.copy_(kept)
            branch.is_calibrated, branch.is_forced = self.flags[name]
        for owner in self.inserted:
            del owner._modules[INDEXER]


def index_loss(model: nn.Module) -> Tensor:
    """The loss of the index branches in the last call of a model that trains, to be added to the loss of that call.

        out = model(input_ids=ids, labels=ids)
        (out.loss + msa_compile.index_loss(model)).backward()

    The sum over sites of the mean divergence, over queries and groups, of index scores from attention on the selected
    blocks, nats. Its gradient reaches the index branches alone, and the model's own loss does not reach them, so that a
    factor before it is a learning rate of theirs. Calibrate first: branches learn little from blocks chosen at random.
    Where the index branches are frozen (`requires_grad_(False)`) nothing of it is computed.

    Args:
        model: A sparsified model in training mode, or a wrapper around one, such as DistributedDataParallel.

    Raises:
        NotSparseError: The model is not sparsified.
        NoIndexLossError: The last call was none of a model that trains, no site selects by a branch that learns, or the
            loss lost its gradient in re-entrant checkpointing.
    """
    inner = next((part for part in model.modules() if isinstance(door_of(part), SparseDoor)), model)
    door = require_sparse(inner)
    losses = {} if door.backend is None else door.backend.index_losses
    if not losses:
        raise NoIndexLossError(
            "there is no index loss: call the model before, in training mode and with gradients, with branches that "
            'are calibrated (or indexer="learned") and not frozen; explain(model) says what each site selects by'
        )
    if not all(loss.requires_grad for loss in losses.values()):
        raise NoIndexLossError(
            "the index loss has no gradient: re-entrant checkpointing runs layers without one. Use "
            'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
    return torch.stack(list(losses.values())).sum()


def _prepare(model: nn.Module, door: SparseDoor, call: Call) -> tuple[dict[str, IndexBranch], _Keeper, tuple[str, ...]]:
    """Find the sites, give each a branch, and put all branches to use in a precision to learn in.

    Returns:
        The branches, what was before, and a note of sites that have an indexer of their own.
    """
    if not door.discovery.records:
        door.before_call(call.args, dict(call.kwargs))
    if not door.discovery.records:
        model(*call.args, **call.kwargs)
    planned = replace(door.config, indexer="learned")
    found = _discovery(model, door, call, planned)
    inserted = insert_index_branches(model, found, is_forced=False)
    branches: dict[str, IndexBranch] = {}
    for site in found.sites:
        if site.indexer == "learned" and site.name in found.carriers:
            branch = model.get_submodule(site.name)._modules.get(INDEXER)
            if isinstance(branch, IndexBranch):
                branches[site.name] = branch
    if not branches:
        sites = as_they_select(model, found).sites
        rows = "\n".join(f"  {site.name or '<root>'}: {site.decision}: {site.detail}" for site in sites)
        raise NothingToCalibrateError(f"no attention site can have an index branch:\n{rows}")
    keeper = _Keeper(
        model,
        branches,
        inserted,
        {name: [p.detach().clone() for p in branch.parameters()] for name, branch in branches.items()},
        {name: (branch.is_calibrated, branch.is_forced) for name, branch in branches.items()},
        {name: branch.q_proj.weight.dtype for name, branch in branches.items()},
        {name: branch.q_proj.weight.requires_grad for name, branch in branches.items()},
    )
    for branch in branches.values():
        branch.to(torch.promote_types(branch.q_proj.weight.dtype, torch.float32)).requires_grad_(True)
        branch.is_forced = True
    own = sorted({site.name for site in found.sites if site.indexer == "own"})
    return branches, keeper, (f"the model's own indexer stays as it is at {', '.join(own)}",) if own else ()


def _discovery(model: nn.Module, door: SparseDoor, call: Call, config: MSAConfig) -> Discovery:
    """What there is in a call of the model, on fake tensors, or on real ones where it cannot be copied (FSDP)."""
    try:
        return discover(model, CallInputs(call.args, call.kwargs), config, door.windows)
    except CaptureError:
        with quiet(model):
            return examine(model, CallInputs(call.args, call.kwargs), config, door.windows, door.compiling_with)


def _observing(model: nn.Module, door: SparseDoor, *, is_sparse: bool) -> Callable[..., Any]:
    def observing(observer: Any) -> Any:
        backend = ObservingBackend(door.config, model, door.windows, door.expected, observer, is_sparse=is_sparse)
        return door.compiling_with(backend)

    return observing


def _decide(
    model: nn.Module, door: SparseDoor, call: Call, branches: Mapping[str, IndexBranch], trained: Trained, bars: Bars
) -> tuple[SiteCalibration, ...]:
    """Use what passed the bar, and nothing else; what was compiled before is forgotten."""
    before, now = trained.measured[0][1], trained.measured[-1][1]
    sites = []
    left_out = []
    for name, branch in branches.items():
        branch.is_forced, branch.is_calibrated = False, bars.are_met(now[name])
        decision = "learned" if branch.is_calibrated else door.config.fallback
        left_out += [glob.escape(name)] if decision == "dense" else []
        sites.append(SiteCalibration(name, decision, before[name].kl, now[name]))
    door.start_over(replace(door.config, exclude=(*door.config.exclude, *left_out)))
    door.discovery = as_they_select(model, _discovery(model, door, call, door.config))
    return tuple(sites)


def _result(
    door: SparseDoor,
    sites: tuple[SiteCalibration, ...],
    trained: Trained,
    stage: str,
    learning_rate: float,
    bars: Bars,
    notes: tuple[str, ...],
    steps: int,
) -> CalibrationResult:
    if trained.is_stopped:
        notes = (
            f"stopped by Ctrl-C after {trained.step} of {steps} steps; what was learned until then is kept",
            *notes,
        )
    names = [site.name for site in sites]

    def ratios(found: Mapping[str, SiteMetrics]) -> tuple[float, ...]:
        return tuple(found[name].mass_ratio for name in names)

    return CalibrationResult(
        sites=sites,
        stage=stage,
        steps=trained.step,
        learning_rate=learning_rate,
        **asdict(bars),
        config=door.config,
        history=tuple(tuple(row) for row in trained.history),
        mass_history=tuple((step, ratios(found)) for step, found in trained.measured),
        dense_nll=None,
        sparse_nll=None,
        notes=notes,
    )


def _with_nll(model: nn.Module, door: SparseDoor, result: CalibrationResult, feed: Batches) -> CalibrationResult:
    """What the whole model loses on the held-out batches, every call of it sparse."""
    every = replace(door.config, dense_below=0)
    backend = MSABackend(every, "eager", model=model, windows=door.windows, expected=door.expected)
    pair = Pair(model, every, lambda: dense(model), lambda: 0, lambda: 0)
    try:
        with door.compiling_with(backend):
            found = evaluate_pair(pair, feed.held_out_batches, (1,), ProbePlan((), 1, None, 0), progress=False)
    except (NoLogitsError, EmptyDataError, BatchError) as error:
        return replace(result, notes=(*result.notes, f"no NLL: {error}"))
    total, device = found.total, next(model.parameters()).device
    sums = torch.tensor([total.dense_nll, total.sparse_nll, 1.0], dtype=torch.float32, device=device) * total.tokens
    add_over_processes([sums])
    return result.with_nll(float(sums[0] / sums[2]), float(sums[1] / sums[2]))


def _check_arguments(
    door: SparseDoor, steps: int, learning_rate: float, stage: str, bars: Bars, max_length: int | None
) -> None:
    if door.config.indexer == "keys":
        raise CalibrateArgumentError(
            'the model was sparsified with indexer="keys", which has nothing to train: use "auto" or "learned"'
        )
    if stage not in STAGES:
        raise CalibrateArgumentError(f"stage is {stage!r}; it must be one of {', '.join(map(repr, STAGES))}")
    for name, value in (("steps", steps), ("max_length", max_length)):
        is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not is_whole and not (name == "max_length" and value is None):
            raise CalibrateArgumentError(f"{name} is {value!r}; it must be a whole number from 1")
    if not (isinstance(learning_rate, (int, float)) and 0 < learning_rate < math.inf):
        raise CalibrateArgumentError(f"learning_rate is {learning_rate!r}; it must be a number above 0")
    for name, bar in asdict(bars).items():
        if not (isinstance(bar, (int, float)) and 0 <= bar <= 1):
            raise CalibrateArgumentError(f"{name} is {bar!r}; it must be a number from 0 to 1")
