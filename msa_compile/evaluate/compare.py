"""Compare the next-token distributions of two models, some positions at a time, and add up by position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_compile.batches import IGNORED, Batch
from msa_compile.errors import BatchError, EvaluateArgumentError, NonFiniteError
from msa_compile.evaluate.result import Bucket

# Elements of one model's logits that are held in float32 at once; a chunk of positions is sized to it.
_WORKSPACE = 1 << 22
_DOUBLINGS = 40
_COUNT, _DENSE, _SPARSE, _SQUARE, _AGREE, _KL = range(6)


@dataclass(frozen=True)
class Compared:
    """Predictions of a chunk, float64 `[n]` each but `agrees`, bool `[n]`.

    Attributes:
        dense_nll, sparse_nll: Negative log-likelihood of the target, nats.
        agrees: Whether the best token is the same.
        kl: `KL(dense || sparse)`, nats.
    """

    dense_nll: Tensor
    sparse_nll: Tensor
    agrees: Tensor
    kl: Tensor


def compare_logits(dense: Tensor, sparse: Tensor, target: Tensor) -> Compared:
    """Compare two distributions of each of `n` tokens.

    Args:
        dense: Logits `[n, V]`, float32 or float64.
        sparse: The same of the other model.
        target: int64 `[n]`, `0 .. V - 1`.

    Raises:
        NonFiniteError: A logit is NaN or infinite; `-inf`, a token that is ruled out, may stand beside others.
    """
    log_dense, log_sparse = (_log_probabilities(name, part) for name, part in (("dense", dense), ("sparse", sparse)))
    of_target = target[:, None]
    # Where p is 0 its logarithm is -inf, and 0 times that is nothing.
    terms = torch.where(log_dense == -torch.inf, 0.0, log_dense.exp() * (log_dense - log_sparse))
    compared = Compared(
        dense_nll=-log_dense.gather(1, of_target)[:, 0].double(),
        sparse_nll=-log_sparse.gather(1, of_target)[:, 0].double(),
        agrees=log_dense.argmax(1) == log_sparse.argmax(1),
        kl=terms.double().sum(1).clamp(min=0.0),
    )
    for name, value in (("dense", compared.dense_nll), ("sparse", compared.sparse_nll), ("sparse", compared.kl)):
        _check_likely(name, value)
    return compared


def sum_of_nll(name: str, logits: Tensor, batch: Batch) -> float:
    """Negative log-likelihood of a batch's predictions that count, added up, nats; logits `[B, T, V]`.

    Raises:
        BatchError, NonFiniteError: As for :func:`compare_logits`; `name` is whose logits these are.
    """
    check_targets(batch, logits.shape[2])
    target = batch.target.flatten()
    total = 0.0
    for chunk in chunks_of(target, logits.shape[2]):
        log = _log_probabilities(name, rows_of(logits, chunk, logits.device))
        nll = -log.gather(1, target[chunk, None].to(log.device))
        _check_likely(name, nll)
        total += float(nll.double().sum())
    return total


def chunks_of(target: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """Flat indices of the predictions that count, in chunks whose logits fit into the workspace."""
    counted = (target.flatten() != IGNORED).nonzero()[:, 0]
    yield from counted.split(max(1, _WORKSPACE // vocabulary))


def rows_of(logits: Tensor, chunk: Tensor, device: torch.device) -> Tensor:
    """The logits of a chunk, `[n, V]`, in float32 (float64 for float64)."""
    rows = logits.flatten(0, 1).index_select(0, chunk.to(logits.device)).to(device)
    return rows if rows.dtype == torch.float64 else rows.float()


def check_targets(batch: Batch, vocabulary: int) -> None:
    """Refuse targets that are no tokens.

    Raises:
        BatchError: A target is negative, or not in the vocabulary.
    """
    counted = batch.target[batch.target != IGNORED]
    if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < vocabulary:
        found = int(counted.min()) if int(counted.min()) < 0 else int(counted.max())
        raise BatchError(
            f"a label is {found}, and the model has logits of {vocabulary} tokens; a token that does not count has the "
            f"label {IGNORED}"
        )


class ByPosition:
    """Sums over predictions, by the position of the token that predicts.

    Args:
        edges: Ascending positions at which a new bucket starts.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        self.edges = tuple(edges)
        self.sums = torch.zeros(len(edges) + 1, 6, dtype=torch.float64)
        self.highest = 0

    def add_batch(self, dense: Tensor, sparse: Tensor, batch: Batch) -> None:
        """Add the predictions of a batch that count; logits `[B, T, V]`, `dense` on any device."""
        check_targets(batch, sparse.shape[2])
        target, position = batch.target.flatten(), batch.position.flatten()
        for chunk in chunks_of(target, sparse.shape[2]):
            there = [rows_of(logits, chunk, sparse.device) for logits in (dense, sparse)]
            self.add(compare_logits(there[0], there[1], target[chunk].to(sparse.device)), position[chunk])

    def add(self, compared: Compared, position: Tensor) -> None:
        """Add predictions at `position`, int64 `[n]`."""
        change = compared.sparse_nll - compared.dense_nll
        columns = [torch.ones_like(change), compared.dense_nll, compared.sparse_nll, change.square()]
        columns += [compared.agrees.double(), compared.kl]
        position = position.cpu()
        where = torch.bucketize(position, torch.tensor(self.edges), right=True)
        self.sums.index_add_(0, where, torch.stack(columns, 1).cpu())
        self.highest = max(self.highest, int(position.max()))

    @property
    def tokens(self) -> int:
        """Predictions so far."""
        return int(self.sums[:, _COUNT].sum())

    def buckets(self) -> tuple[Bucket, ...]:
        """The means of each range that has predictions."""
        starts, stops = (0, *self.edges), (*self.edges, self.highest + 1)
        rows = zip(starts, stops, self.sums, strict=True)
        return tuple(
            _bucket(start, min(stop, self.highest + 1), sums) for start, stop, sums in rows if sums[_COUNT] > 0
        )

    def total(self) -> Bucket:
        """The means of all predictions."""
        return _bucket(0, self.highest + 1, self.sums.sum(0))


def default_edges(budget: int) -> tuple[int, ...]:
    """Up to the budget attention is dense by construction; from there on each range is twice as long as the last."""
    return tuple(budget << doubling for doubling in range(_DOUBLINGS))


def check_edges(edges: Sequence[int]) -> tuple[int, ...]:
    """`edges` if they part positions into ranges.

    Raises:
        EvaluateArgumentError: If they do not.
    """
    numbers = [edge for edge in edges if isinstance(edge, int) and not isinstance(edge, bool) and edge > 0]
    if len(numbers) != len(edges) or numbers != sorted(set(numbers)):
        raise EvaluateArgumentError(
            f"position_edges is {list(edges)}; needed are ascending whole numbers from 1, such as [1024, 4096]"
        )
    return tuple(numbers)


def _log_probabilities(name: str, logits: Tensor) -> Tensor:
    normalised = logits.log_softmax(1)
    if not bool(normalised.logsumexp(1).isfinite().all()):
        kinds = [kind for kind, bad in (("NaN", logits.isnan()), ("+inf", logits == torch.inf)) if bool(bad.any())]
        raise NonFiniteError(
            f"the {name} model's logits hold {' and '.join(kinds) or 'nothing but -inf in a row'}; nothing was "
            "compared further. Look for an overflow (float16), a row whose tokens are all masked, or broken weights"
        )
    return normalised


def _check_likely(name: str, nats: Tensor) -> None:
    if not bool(nats.isfinite().all()):
        raise NonFiniteError(
            f"the {name} model rules out a token that is likely or comes (its logit is -inf there), so that the "
            "comparison is no number: leave such tokens out with labels of -100"
        )


def _bucket(start: int, stop: int, sums: Tensor) -> Bucket:
    count = int(sums[_COUNT])
    mean = (sums / count).tolist()
    change = mean[_SPARSE] - mean[_DENSE]
    variance = max(0.0, mean[_SQUARE] - change**2)
    return Bucket(
        start=start,
        stop=stop,
        tokens=count,
        dense_nll=mean[_DENSE],
        sparse_nll=mean[_SPARSE],
        nll_error=math.sqrt(variance / count),
        agreement=mean[_AGREE],
        kl=mean[_KL],
    )
