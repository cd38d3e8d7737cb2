"""What was measured of a model, as text for a terminal and as Markdown."""

from __future__ import annotations

from msa_compile.bench.amdahl import ceiling
from msa_compile.bench.result import DENSE, SPARSE, LengthResult, ModelResult
from msa_compile.bench.spread import Spread
from msa_compile.table import to_table

_COLUMNS = ("length", "what", "dense", "sparse", "sparse is", "attention of dense", "ceiling")


def to_text(result: ModelResult) -> str:
    """For a terminal; with rich where it is installed."""
    rows = [row for length in result.lengths for row in _rows(length)]
    table = [to_table(_COLUMNS, rows, left=("what",))] if rows else []
    return "\n".join([*_head(result), *table, *_foot(result)])


def to_markdown(result: ModelResult) -> list[str]:
    """Lines of a section."""
    lines = [f"### {result.model}, {result.dtype}, {result.threads} thread(s), {result.indexer}", ""]
    lines += [f"- {said}" for said in _head(result)]
    if result.lengths:
        lines += ["", "| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
        lines += ["| " + " | ".join(row) + " |" for length in result.lengths for row in _rows(length)]
        lines.append("")
    return lines + [f"- {said}" for said in _foot(result)]


def _head(result: ModelResult) -> list[str]:
    return [
        f"{result.model}: {result.layers} of {result.all_layers} layers, {result.parameters / 1e6:,.1f} million "
        f"parameters; {'; '.join(result.notes)}",
        f"{result.device}, {result.threads} thread(s), {result.dtype}, torch {result.torch}, inner compiler of "
        f"both {result.inner}; {result.topk} blocks of {result.block_size}",
        f"gate {result.gate}",
        f"{result.sparse_sites} sparse and {result.dense_sites} dense sites; calls that ran dense around the model: "
        f"{result.dense_calls}",
        *result.dense_below,
        *_branches(result),
    ]


def _branches(result: ModelResult) -> list[str]:
    if not result.learned_sites:
        return []
    return [
        f"{result.learned_sites} sites with an index branch that is not trained: it takes a trained one's time, and "
        f"selects other blocks; selections without index keys: {result.missed_selections}"
    ]


def _foot(result: ModelResult) -> list[str]:
    lines = [
        f"compiling, {name}: {taken.cold:.1f} s cold, {taken.warm:.1f} s warm (first calls above later ones)"
        for name, taken in result.compiling.items()
    ]
    if result.lengths:
        lines.append(
            "ceiling: the speed-up if attention took no time, from the share that SDPA alone takes of the dense time "
            "(of the FLOPs in brackets)"
        )
    return lines


def _rows(length: LengthResult) -> list[tuple[str, ...]]:
    shares = length.shares
    name = f"{length.length}"
    first, step, peak = length.first_token, length.step, length.peak_bytes
    return [
        (
            name,
            "time to first token",
            _seconds(first[DENSE]),
            _seconds(first[SPARSE]),
            _ratio(length.first_token_ratio),
            f"{shares.prefill_time:.0%} ({shares.prefill_flops:.0%})",
            f"{_ceiling(shares.prefill_time)} ({_ceiling(shares.prefill_flops)})",
        ),
        (
            name,
            "tokens per second",
            f"{1 / step[DENSE].median:.2f}",
            f"{1 / step[SPARSE].median:.2f}",
            _ratio(length.step_ratio),
            f"{shares.decode_time:.0%}",
            _ceiling(shares.decode_time),
        ),
        (name, "peak memory above weights", _bytes(peak[DENSE]), _bytes(peak[SPARSE]), "", "", ""),
    ]


def _ceiling(share: float) -> str:
    # SDPA is timed apart from the model, and on a busy machine it can seem to take longer than all of it.
    return f"{ceiling(share):.2f}x" if share < 1 else "unknown"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f}x [{spread.low:.2f}, {spread.high:.2f}]"


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.3g} s" if spread.median >= 1 else f"{spread.median * 1e3:.3g} ms"


def _bytes(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:.0f} MiB"
