"""Check one architecture: what is found, and that its numbers are right with every block and with few."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

import msa_compile
from benchmarks.census.architectures import KEY_VALUE_HEADS, VOCAB, Causal
from benchmarks.census.oracle import AttentionCalls, BlockOracle
from msa_compile import MSAConfig, Report
from msa_compile.backend import MSABackend
from msa_compile.errors import CaptureError, NothingToSparsifyError
from msa_compile.kernels.block_sparse_attention import cpu
from msa_compile.markers import tag_frames
from msa_compile.report import build_report

LENGTH, PADDED, STEPS = 37, 5, 4
BLOCK_SIZE, FEW = 4, 3
EXACT = 1e-4  # float32, logits of a size of about 1


@dataclass
class Row:
    """What the census says of one architecture.

    Attributes:
        name: Its ``model_type``.
        built: Whether there is a tiny model of it, and it ran.
        counted: Attention calls of one forward, counted in eager mode.
        grouped: Whether it has fewer key/value heads than query heads.
        sparse: Sites that are sparse.
        dense: Reason and number of the sites that are not.
        forms: Spelling and mask of the sparse sites.
        graphs: Graphs that one call was captured as.
        errors: Largest difference of logits, or number of tokens that differ, for each check.
        skipped: Checks that the untouched model itself does not pass, and its error.
        failure: What went wrong, or ``""``.
        seconds: Time taken.
    """

    name: str
    built: bool = False
    counted: int = 0
    grouped: bool = False
    sparse: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0

    @property
    def missed(self) -> int:
        """Attention calls that the report says nothing of."""
        return self.counted - self.sparse - sum(self.dense.values())

    @property
    def right(self) -> bool:
        """Whether every check held and no call was missed."""
        return not self.failure and self.missed == 0 and all(error <= EXACT for error in self.errors.values())

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return {**asdict(self), "missed": self.missed, "right": self.right}


def check_architecture(name: str) -> Row:
    """Build, sparsify and check one architecture; errors end in the row."""
    started = time.perf_counter()
    row = Row(name)
    try:
        with torch.no_grad():
            _check(Causal(name), row)
    except Exception as error:
        row.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    row.seconds = time.perf_counter() - started
    return row


def _check(untouched: Causal, row: Row) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=generator)
    with AttentionCalls() as calls:
        untouched(ids)
    row.built = True
    row.counted, row.grouped = calls.count, calls.grouped or _has_groups(untouched)
    try:
        few = _sparsified(untouched, FEW, ids)
    except NothingToSparsifyError:
        _describe(_examined(untouched, ids), row)
        if row.sparse:
            row.failure = "explain calls sparse what sparsify does not find"
        return
    report = msa_compile.explain(few.model)
    _describe(report, row)
    _check_few_blocks(untouched, few, ids, row, report)
    every = _sparsified(untouched, -(-(LENGTH + STEPS + 1) // BLOCK_SIZE) + 1, ids)
    _check_every_block(untouched, every, ids, row)


def _examined(untouched: Causal, ids: Tensor) -> Report:
    """The report of a model in which nothing is sparse; of a real call where it cannot be captured on fake tensors."""
    try:
        return msa_compile.explain(untouched.model, input_ids=ids, config=_config(FEW))
    except CaptureError:
        model = copy.deepcopy(untouched.model)
        backend = MSABackend(_config(FEW), "eager", model=model)
        tag_frames(model)  # equal layers would share the graphs between breaks
        torch.compile(model, backend=backend)(input_ids=ids)
        return build_report(backend.records, _config(FEW), {}, sparsified=False)


def _describe(report: Report, row: Row) -> None:
    row.sparse, row.graphs = len(report.sparse), report.graphs
    row.dense = dict(Counter(site.reason.value for site in report.dense if site.reason))
    row.forms = dict(Counter(f"{site.form}, {site.mask}" for site in report.sparse))


def _config(topk: int) -> MSAConfig:
    return MSAConfig(block_size=BLOCK_SIZE, topk_blocks=topk, dense_below=0)


def _has_groups(causal: Causal) -> bool:
    config = causal.model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None)
    return bool(heads and groups and groups < heads)


def _sparsified(untouched: Causal, topk: int, ids: Tensor) -> Causal:
    model = copy.deepcopy(untouched)
    try:
        msa_compile.sparsify(model.model, _config(topk), example_inputs={"input_ids": ids}, inner="eager")
    except CaptureError:  # not on fake tensors: then at the first call, on real ones
        msa_compile.sparsify(model.model, _config(topk), inner="eager")
        model(ids)
    return model


def _padding() -> Tensor:
    return (torch.arange(LENGTH) >= torch.tensor([[0], [PADDED]])).long()


def _check_every_block(dense: Causal, sparse: Causal, ids: Tensor, row: Row) -> None:
    """With a budget that covers all keys: the logits and tokens of the untouched model, by the sparse ops."""
    mask = _padding()
    checks: dict[str, Any] = {
        "padded": lambda model: torch.where(mask[..., None].bool(), model(ids, attention_mask=mask), 0),
        "dynamic": lambda model: _generate(model, ids, mask),
        "static": lambda model: _generate(model, ids, mask, cache_implementation="static", disable_compile=True),
    }
    for check, call in checks.items():
        try:
            expected = call(dense)
        except Exception as error:
            row.skipped[check] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        with _ops_ran(at_least=1):
            found = call(sparse)
        row.errors[check] = _difference(expected, found)


def _generate(causal: Causal, ids: Tensor, mask: Tensor, **how: Any) -> Tensor:
    generate: Any = causal.model.generate
    tokens: Tensor = generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, pad_token_id=0, **how
    )
    return tokens


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    if not expected.dtype.is_floating_point:
        return float((expected != found).sum())
    return float((expected - found).abs().max())


def _check_few_blocks(dense: Causal, sparse: Causal, ids: Tensor, row: Row, report: Report) -> None:
    """With few blocks: the logits of the untouched model whose attention the oracle computes, in each decode step."""
    mask = _padding()
    decisions = [site.decision for site in report.sites]
    oracle = BlockOracle(decisions, BLOCK_SIZE, FEW, _written_out_heads(dense))
    oracle.batch, oracle.query_length, oracle.key_length = ids.shape[0], LENGTH, LENGTH
    with oracle:
        expected = dense(ids)
    if oracle.count != len(decisions):
        row.failure = f"{len(decisions)} sites in the report, {oracle.count} attention calls"
        return
    with _ops_ran(at_least=row.sparse):
        found = sparse(ids)
    row.errors["few blocks"] = _difference(expected, found)
    caches = [_cache(model) for model in (dense, sparse)]
    if None in caches:
        return
    length = 0
    for piece in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
        length += piece.shape[1]
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, length - piece.shape[1] : length]
        how = {"attention_mask": mask[:, :length], "position_ids": places, "use_cache": True}
        oracle.query_length, oracle.key_length = piece.shape[1], length
        try:
            with oracle:
                expected = dense(piece.contiguous(), past_key_values=caches[0], **how)
        except (TypeError, ValueError) as error:
            row.skipped["few blocks, cache"] = f"{type(error).__name__}: {error}"
            return
        found = sparse(piece.contiguous(), past_key_values=caches[1], **how)
        shown = mask[:, length - piece.shape[1] : length, None].bool()
        gap = _difference(torch.where(shown, expected, 0), torch.where(shown, found, 0))
        row.errors["few blocks, cache"] = max(gap, row.errors.get("few blocks, cache", 0.0))


def _cache(causal: Causal) -> Any:
    try:
        return transformers.DynamicCache(config=causal.model.config)
    except Exception:
        return None


def _written_out_heads(causal: Causal) -> int:
    config = causal.model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    groups: int | None = getattr(config, "num_key_value_heads", None)
    heads: int = getattr(config, "num_attention_heads", KEY_VALUE_HEADS)
    return groups or heads


@contextlib.contextmanager
def _ops_ran(at_least: int) -> Iterator[None]:
    """Fail unless the sparse attention op ran inside."""
    ran = 0
    attend = cpu.block_sparse_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        ran += 1
        return attend(*args, **kwargs)

    cpu.block_sparse_attention = counted
    try:
        yield
    finally:
        cpu.block_sparse_attention = attend
    if ran < at_least:
        raise AssertionError(f"the sparse op ran {ran} times, expected {at_least}")
