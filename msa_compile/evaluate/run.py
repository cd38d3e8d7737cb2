"""Call a model dense and sparse on every batch, and put what was found together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msa_compile.batches import Batch, check_iterable, logits_of, nothing_counts, quiet, read_batch
from msa_compile.config import MSAConfig
from msa_compile.evaluate.compare import ByPosition
from msa_compile.evaluate.probes import ProbePlan, run_probes
from msa_compile.evaluate.result import Evaluation, ProbeResult
from msa_compile.progress import progress_bar

# Tokens of the data that are kept as text for the probes to hide things in.
_MOST_KEPT = 1 << 20


@dataclass(frozen=True)
class Pair:
    """A sparsified model, and how to have the dense one for a while.

    Attributes:
        model: Sparse as it stands.
        config: Of the sparse model.
        dense: Makes the block in which `model` is dense.
        dense_calls: How many calls of sparse sites ran dense so far, which should be none.
        dense_below: Up to how many keys some sparse site runs dense, as far as that is known now.
    """

    model: nn.Module
    config: MSAConfig
    dense: Callable[[], AbstractContextManager[Any]]
    dense_calls: Callable[[], int]
    dense_below: Callable[[], int]

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits `[B, T, V]` of the dense model, moved to main memory, and of the sparse one."""
        with self.dense():
            output = self.model(*batch.args, **batch.kwargs)
        # One set of logits on the device at a time is what any call of the model needs there.
        dense = logits_of(output, batch).cpu()
        del output
        return dense, logits_of(self.model(*batch.args, **batch.kwargs), batch)


def evaluate_pair(
    pair: Pair, batches: Iterable[Any], edges: Sequence[int], plan: ProbePlan, *, progress: bool
) -> Evaluation:
    """Compare on every batch, then on the probes.

    Raises:
        EmptyDataError: There is nothing to compare.
        BatchError, NoLogitsError, NonFiniteError: A batch, or what the model makes of it.
    """
    sums = ByPosition(edges)
    lengths: list[int] = []
    text: list[Tensor] = []
    probes: tuple[ProbeResult, ...] = ()
    before = pair.dense_calls()
    example = None
    try:
        with quiet(pair.model):
            with progress_bar("dense and sparse", "batch", total=_length_of(batches), shown=progress) as bar:
                for given in check_iterable(batches):
                    batch = read_batch(pair.model, given)
                    if batch.counted:
                        if plan.lengths and example is None:
                            # Said now, and not after everything else.
                            batch.with_ids(pair.model, batch.ids)
                        sums.add_batch(*pair.logits(batch), batch)
                        lengths.append(batch.ids.shape[1])
                        example = batch
                        if plan.lengths and sum(map(len, text)) < _MOST_KEPT:
                            text.append(batch.ids[batch.real].cpu())
                        bar.set_postfix_str(f"NLL {sums.total().nll_change:+.4f}", refresh=False)
                    bar.update()
            if example is None:
                nothing_counts()
            if text:
                call = functools.partial(example.with_ids, pair.model)
                probes = run_probes(pair.logits, call, torch.cat(text), plan, progress=progress)
    except KeyboardInterrupt as stopped:
        if lengths:
            stopped.add_note(f"so far:\n{_evaluation(pair, sums, lengths, probes, before)}")
        raise
    return _evaluation(pair, sums, lengths, probes, before)


def _evaluation(
    pair: Pair, sums: ByPosition, lengths: Sequence[int], probes: tuple[ProbeResult, ...], before: int
) -> Evaluation:
    notes = _notes(pair, sums, lengths, probes, pair.dense_calls() - before)
    return Evaluation(sums.total(), sums.buckets(), probes, pair.config, len(lengths), tuple(notes))


def _notes(
    pair: Pair, sums: ByPosition, lengths: Sequence[int], probes: Sequence[ProbeResult], dense_calls: int
) -> list[str]:
    notes = []
    threshold = pair.dense_below()
    calls = [*lengths, *(probe.length for probe in probes)]
    short = sum(length <= threshold for length in calls)
    if short:
        notes.append(
            f"{short} of {len(calls)} batches and probes have at most {threshold} keys, up to which calls run dense "
            "(dense_below): both sides are dense there. MSAConfig(dense_below=0) compares them too"
        )
    budget = max([pair.config.topk_blocks, *(topk for _, topk in pair.config.own_budgets)]) * pair.config.block_size
    if sums.highest < budget:
        notes.append(
            f"no prediction saw more than {sums.highest + 1} keys, and {budget} are the budget: sparse attention is "
            "dense there by construction. Longer texts show what it costs"
        )
    if dense_calls:
        notes.append(
            f"WARNING: {dense_calls} calls of sparse sites ran DENSE although the model is sparsified, so that the "
            "comparison is too good; explain(model) says where"
        )
    return notes


def _length_of(batches: object) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None
