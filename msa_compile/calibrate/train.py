"""Train the index branches of a frozen model, one site of one call at a time.

The model runs without gradients. Where a call reaches a site, the branch's loss and the gradient of its weights are
computed and forgotten before the model goes on: beyond the weights and their optimizer, memory is that of one branch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msa_compile.batches import quiet
from msa_compile.calibrate.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from msa_compile.calibrate.feed import Call, Enough, Feed
from msa_compile.calibrate.metrics import MetricSums, SiteMetrics, add_metrics, compare, support_of
from msa_compile.calibrate.shards import add_over_processes, copy_from_first, is_alone, is_first
from msa_compile.calibrate.start import Start, is_untrained
from msa_compile.config import MSAConfig
from msa_compile.errors import EmptyDataError, NonFiniteError
from msa_compile.indexer import IndexBranch
from msa_compile.kernels.select_blocks.fresh import sees_unwritten
from msa_compile.observed import Observer, SiteCall
from msa_compile.progress import Progress, progress_bar

# At most so long ago was a checkpoint written.
SECONDS_BETWEEN_CHECKPOINTS = 30.0
_WARM_UP, _LEAST_RATE = 0.03, 0.1  # shares of the steps, and of the learning rate
_MOST_IGNORED = 1000
_MEASURED = 4  # times after the first
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Task:
    """A calibration that can start.

    Attributes:
        model: With its branches inserted and in use.
        config: Of the model.
        branches: By the name of their site, in the order of the model.
        feed: Where calls come from.
        watching: Makes the block in which an observer sees every call of a site.
        steps: Calls to learn from.
        learning_rate: Its highest.
        stage: What scores and attention are compared on, see `calibrate`.
        is_split: Whether each process has the query weights of other groups than the others have.
        said: What this is, in plain values; a checkpoint of something else is refused.
        checkpoint: Where to keep the state, if anywhere.
        progress: Whether a bar is shown.
    """

    model: torch.nn.Module
    config: MSAConfig
    branches: Mapping[str, IndexBranch]
    feed: Feed
    watching: Callable[[Observer], AbstractContextManager[Any]]
    steps: int
    learning_rate: float
    stage: str
    is_split: bool
    said: dict[str, Any]
    checkpoint: Path | None
    progress: bool


@dataclass
class Trained:
    """What training did.

    Attributes:
        step: Steps that were done, in earlier runs too.
        history: Mean divergence of each site, a row a step.
        measured: Steps at which metrics were taken, and the metrics of each site.
        is_stopped: Whether Ctrl-C ended it.
    """

    step: int = 0
    history: list[list[float]] = field(default_factory=list)
    measured: list[tuple[int, dict[str, SiteMetrics]]] = field(default_factory=list)
    is_stopped: bool = False


class Run:
    """One calibration.

    Args:
        task: What to do.
        finish: Called when the weights are final, before the last metrics: it brings them to their own dtype.
    """

    def __init__(self, task: Task, finish: Callable[[], None]) -> None:
        self.task, self._finish = task, finish
        self.trained = Trained()
        self._seen: Observer = lambda call: None
        self._is_stepping = False
        self._weights = {name: list(branch.parameters()) for name, branch in task.branches.items()}
        self._shared = [
            weight
            for branch in task.branches.values()
            for weight in branch.parameters()
            if not (task.is_split and weight is branch.q_proj.weight)
        ]
        self._optimizer = torch.optim.Adam([w for ws in self._weights.values() for w in ws], betas=_BETAS)

    def run(self) -> Trained:
        """Train, and measure before, meanwhile and at the end. Ctrl-C ends the training and keeps what it did.

        Raises:
            NonFiniteError, EmptyDataError, BatchError: The data, or what the model makes of it.
            CheckpointError: The checkpoint is of another run.
        """
        self._resume()
        task, trained = self.task, self.trained
        copy_from_first(weight.data for weight in self._shared)
        shown = task.progress and is_first()
        with quiet(task.model), task.watching(lambda call: self._seen(call)):
            try:
                if not trained.measured:
                    self._start()
                    self._measure()
                    self._check_long_enough()
                with progress_bar("calibrate", "step", total=task.steps, shown=shown) as bar:
                    bar.update(trained.step)
                    if trained.step < task.steps:
                        learner = _Learner(self, bar)
                        self._seen = learner.see
                        with suppress(Enough):
                            task.feed.training(learner)
            except KeyboardInterrupt:
                trained.is_stopped = True
                if not self._is_stepping:
                    self.save()
            self._finish()
            self._measure()
        return trained

    def step(self, losses: Mapping[str, Tensor], queries: Mapping[str, Tensor]) -> float:
        """Turn the gradients that were added up into a step; returns the mean divergence over sites."""
        gradients = []
        for weight in (weight for weights in self._weights.values() for weight in weights):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients.append(weight.grad)
        names = list(self._weights)
        device, dtype = gradients[0].device, gradients[0].dtype
        loss = torch.stack([losses.get(name, torch.zeros(())).to(device, dtype) for name in names])
        count = torch.stack([queries.get(name, torch.zeros(())).to(device, dtype) for name in names])
        add_over_processes([*(weight.grad for weight in self._shared if weight.grad is not None), loss, count])
        if not bool(count.any()):
            raise EmptyDataError(
                "no site with an index branch saw a token that counts in this call; is the data all padding, or does "
                "the model attend in another way on it than on the first call?"
            )
        for name, number in zip(names, count.clamp(min=1).tolist(), strict=True):
            for weight in self._weights[name]:
                assert weight.grad is not None, "gradients were made above"
                weight.grad /= number
        means = (loss / count.clamp(min=1)).tolist()
        self._check_finite(dict(zip(names, means, strict=True)), gradients)
        for group in self._optimizer.param_groups:
            group["lr"] = self.task.learning_rate * _rate(self.trained.step, self.task.steps)
        self._is_stepping = True
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.trained.step += 1
        self.trained.history.append(means)
        self._is_stepping = False
        return sum(means) / len(means)

    def between_steps(self, is_due: bool) -> None:
        """Measure, and save where it is due."""
        if self.trained.step < self.task.steps and self.trained.step in _measuring_steps(self.task.steps):
            seen = self._seen
            self._measure()
            self._seen = seen
        if is_due:
            self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        if self.task.checkpoint is None or not is_first():
            return
        trained = self.trained
        weights = {
            name: {part: tensor.detach().cpu() for part, tensor in branch.named_parameters()}
            for name, branch in self.task.branches.items()
        }
        measured = [(step, {name: asdict(found) for name, found in sites.items()}) for step, sites in trained.measured]
        write_checkpoint(
            Checkpoint(self.task.said, trained.step, weights, self._optimizer.state_dict(), trained.history, measured),
            self.task.checkpoint,
        )

    def _start(self) -> None:
        untrained = {name: branch for name, branch in self.task.branches.items() if is_untrained(branch)}
        if untrained:
            start = Start(untrained, is_split=self.task.is_split)
            self._seen = start.see
            with suppress(Enough):
                self.task.feed.held_out(start)

    def _resume(self) -> None:
        found = read_checkpoint(self.task.checkpoint, self.task.said) if self.task.checkpoint else None
        if found is None:
            return
        with torch.no_grad():
            for name, branch in self.task.branches.items():
                for part, tensor in branch.named_parameters():
                    tensor.copy_(found.weights[name][part])
        self._optimizer.load_state_dict(found.optimizer)
        measured = [(step, {name: SiteMetrics(**entry) for name, entry in s.items()}) for step, s in found.measured]  # type: ignore[arg-type]
        self.trained = Trained(found.step, found.history, measured)

    def _measure(self) -> None:
        measure = _Measure(self.task)
        self._seen = measure.see
        # Ctrl-C may have left a branch's gradients on.
        with torch.no_grad():
            self.task.feed.held_out(measure)
        totals = torch.stack([sums.as_tensor() for sums in measure.sums.values()])
        totals = totals.to(next(iter(self._weights.values()))[0].device)
        add_over_processes([totals])
        found = {name: MetricSums(*row).means() for name, row in zip(measure.sums, totals.cpu(), strict=True)}
        # A run that goes on at its end has measured there before.
        earlier = [entry for entry in self.trained.measured if entry[0] != self.trained.step]
        self.trained.measured = [*earlier, (self.trained.step, found)]

    def _check_long_enough(self) -> None:
        if any(found.queries for found in self.trained.measured[-1][1].values()):
            return
        config = self.task.config
        raise EmptyDataError(
            f"no query of the held-out batches sees more than {config.topk_blocks} blocks of {config.block_size} keys, "
            "so that nothing is selected and nothing can be judged: give rows of more than "
            f"{config.topk_blocks * config.block_size} tokens, several times that to be of use, or sparsify with a "
            "smaller budget"
        )

    def _check_finite(self, losses: Mapping[str, float], gradients: list[Tensor]) -> None:
        broken = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if not broken and all(bool(gradient.isfinite().all()) for gradient in gradients):
            return
        raise NonFiniteError(
            f"step {self.trained.step}: the loss of {broken[0] or '<root>' if broken else 'a branch'} or its gradient "
            "is NaN or infinite, and nothing was learned from this call. Look at the batch, at an overflow of the base "
            "(float16), or lower the learning rate"
        )


class _Measure:
    """Takes the metrics of every site on the calls that it visits."""

    def __init__(self, task: Task) -> None:
        self.sums = {name: MetricSums.zeros() for name in task.branches}
        self._stage = task.stage
        self._counted: Tensor | None = None

    def begin(self, call: Call) -> bool:
        self._counted = call.counted
        return True

    def end(self) -> None:
        pass

    def see(self, call: SiteCall) -> None:
        _check_call(call, self._counted)
        if call.name in self.sums and not _misses_keys(call):
            add_metrics(self.sums[call.name], call, self._counted, self._stage)


class _Learner:
    """Learns from every call that it visits, one step each."""

    def __init__(self, run: Run, bar: Progress) -> None:
        self._run, self._bar = run, bar
        self._to_skip = run.trained.step
        self._counted: Tensor | None = None
        self._learns = False
        self._losses: dict[str, Tensor] = {}
        self._queries: dict[str, Tensor] = {}
        self._saved = time.monotonic()
        # Calls of one token on a cache that was filled before the last step: no step, but not without end.
        self._is_ignored = False
        self._ignored = 0

    def begin(self, call: Call) -> bool:
        # A run that goes on has learned from the first calls already.
        self._learns = self._to_skip == 0
        self._to_skip -= not self._learns
        self._counted = call.counted
        return self._learns

    def see(self, call: SiteCall) -> None:
        if not self._learns or call.name not in self._run.task.branches:
            return
        _check_call(call, self._counted)
        if _misses_keys(call):
            self._is_ignored = True
            return
        ids = None
        if self._run.task.stage == "sparse":
            ids = torch.ops.msa.select_blocks(
                call.index_query.detach(), call.index_key.detach(), **call.budget, **call.bounds
            )
        sums = compare(call, self._counted, self._run.task.stage, ids)
        assert sums.grad_index_query is not None and sums.grad_index_key is not None, "they were asked for"
        outputs = (call.index_query, call.index_key)
        gradients = (sums.grad_index_query, sums.grad_index_key)
        torch.autograd.backward(outputs, [g.to(o.dtype) for o, g in zip(outputs, gradients, strict=True)])
        self._losses[call.name] = self._losses.get(call.name, torch.zeros(())) + sums.loss.cpu()
        self._queries[call.name] = self._queries.get(call.name, torch.zeros(())) + sums.queries.cpu()

    def end(self) -> None:
        run = self._run
        self._learns = False
        if self._is_ignored and not self._queries and is_alone():
            self._ignore()
            return
        loss = run.step(self._losses, self._queries)
        self._losses, self._queries, self._ignored, self._is_ignored = {}, {}, 0, False
        self._bar.set_postfix_str(f"KL {loss:.4f}", refresh=False)
        self._bar.update()
        is_over = run.trained.step >= run.task.steps
        is_due = is_over or time.monotonic() - self._saved >= SECONDS_BETWEEN_CHECKPOINTS
        if is_due:
            self._saved = time.monotonic()
        run.between_steps(is_due)
        if is_over:
            raise Enough

    def _ignore(self) -> None:
        self._ignored, self._is_ignored = self._ignored + 1, False
        if self._ignored > _MOST_IGNORED:
            raise EmptyDataError(
                f"{self._ignored} calls in a row continued a cache that was filled before the branches last changed, "
                "which teaches nothing: let the forward_loop call the model with whole texts"
            )


def _check_call(call: SiteCall, counted: Tensor | None) -> None:
    rows = support_of(call, counted).counted
    assert rows is not None, "it is always said which queries count"
    if not bool(call.query.transpose(1, 2)[rows].isfinite().all()):
        raise NonFiniteError(
            f"the queries of {call.name or '<root>'} hold NaN or infinities: the base makes no numbers of this batch. "
            "Nothing was learned from it; look for an overflow (float16) or broken weights"
        )


def _misses_keys(call: SiteCall) -> bool:
    """Whether a query sees a token of an earlier call whose index key is of other weights than now."""
    names = ("query_start", "key_start", "key_end", "document_start", "mask")
    bounds = [call.bounds.get(name) for name in names]
    is_causal = bool(call.bounds.get("is_causal", True))
    return sees_unwritten(call.index_key, call.query.shape[2], *bounds, is_causal=is_causal)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: it rises, and falls along a cosine."""
    warm = max(1, round(steps * _WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return _LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _measuring_steps(steps: int) -> set[int]:
    return {steps * part // _MEASURED for part in range(1, _MEASURED)}
