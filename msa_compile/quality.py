"""The verbs that measure a sparse model against the dense one on the user's data: wiring only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from msa_compile.api import SparseDoor, count_dense_calls, dense, require_sparse
from msa_compile.backend import BudgetBackend
from msa_compile.evaluate.budget import BudgetTask, fit
from msa_compile.evaluate.compare import check_edges, default_edges
from msa_compile.evaluate.fitted import BudgetFit
from msa_compile.evaluate.probes import ProbePlan, check_plan
from msa_compile.evaluate.result import Evaluation
from msa_compile.evaluate.run import Pair, evaluate_pair


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
    door = require_sparse(model)
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
    door = require_sparse(model)
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

    return Pair(
        model, door.config, lambda: dense(model), lambda: sum(count_dense_calls(model, door).values()), dense_below
    )
