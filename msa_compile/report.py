"""The report of ``explain``: every attention site, what was decided and why, and what it saves."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from msa_compile.config import MSAConfig
from msa_compile.records import GraphRecord, Site

LENGTHS = (8 * 1024, 32 * 1024, 128 * 1024, 1024 * 1024)


@dataclass(frozen=True)
class Report:
    """What the package knows of a model's attention.

    Attributes:
        sites: One row for each site and each different decision on it, over all captured graphs.
        config: The configuration that decided.
        graphs: How many graphs were captured.
        dense_calls: How often a site ran dense although the model is sparsified; 0 is what it should be.
        sparsified: Whether the model is sparsified now.
        evaluated: What the last :func:`msa_compile.evaluate` found, in a line; ``""`` before there was one.
        missed_selections: How often a site with a learned indexer had to score with ``"keys"`` for want of index keys.
        calibrated: What the last :func:`msa_compile.calibrate` did, in a line; ``""`` before there was one.
        calibration: What it found, by site.
    """

    sites: tuple[Site, ...]
    config: MSAConfig
    graphs: int
    dense_calls: int
    sparsified: bool
    evaluated: str = ""
    missed_selections: int = 0
    calibrated: str = ""
    calibration: Mapping[str, str] = field(default_factory=dict)

    @property
    def sparse(self) -> tuple[Site, ...]:
        """The rows that are sparse."""
        return tuple(site for site in self.sites if site.decision == "sparse")

    @property
    def dense(self) -> tuple[Site, ...]:
        """The rows that stay dense, each with a reason."""
        return tuple(site for site in self.sites if site.decision == "dense")

    def flops(self, length: int) -> tuple[int, int]:
        """Attention FLOPs of one causal prefill of ``length`` tokens: dense, and as decided.

        Source: spec 9, ``F_GQA = 2 Hq D N^2`` and ``F_MSA = Hkv D N^2 + 4 Hq D N k B_k`` (paper 3.3): products only, no
        projections. Up to ``dense_below`` keys a site runs dense.
        """
        before = after = 0
        for site in {row.name: row for row in reversed(self.sites)}.values():
            dense, sparse = site_flops(site, self.config.for_site(site.name), length)
            before += dense
            after += sparse
        return before, after

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python values, ready for JSON."""
        return {
            "sites": [site.to_dict() for site in self.sites],
            "config": dict(self.config.__dict__),
            "graphs": self.graphs,
            "dense_calls": self.dense_calls,
            "sparsified": self.sparsified,
            "evaluated": self.evaluated,
            "missed_selections": self.missed_selections,
            "calibrated": self.calibrated,
            "calibration": dict(self.calibration),
            "flops": {length: list(self.flops(length)) for length in LENGTHS},
        }

    def __str__(self) -> str:
        cells = [_cells(site, self.config, self.calibration.get(site.name, "")) for site in self.sites]
        text = _rich_table(cells) if importlib.util.find_spec("rich") else _plain_table(cells)
        lines = [*self._reasons(), *self._settings(), *self._indexers(), *self._savings()]
        return "\n".join([self._headline(), text.rstrip(), *lines])

    def _headline(self) -> str:
        state = "sparsified" if self.sparsified else "not sparsified, nothing was changed"
        common = self.config.topk_blocks
        own = sum(bool(row.own_budget) or self.config.for_site(row.name).topk_blocks != common for row in self.sparse)
        budget = f"{self.config.topk_blocks} blocks of {self.config.block_size} keys"
        budget += f" ({own} rows with a budget of their own)" if own else ""
        return (
            f"MSA: {len(self.sparse)} sparse and {len(self.dense)} dense rows in {self.graphs} graph(s); {budget}; "
            f"{state}; dense calls: {self.dense_calls}"
        )

    def _reasons(self) -> list[str]:
        reasons = dict.fromkeys(site.reason for site in self.dense if site.reason)
        return [f"  {reason.value}: {reason.sentence}" for reason in reasons]

    def _settings(self) -> list[str]:
        said = dict.fromkeys(str(site.dense_below) for site in self.sparse if site.dense_below)
        unused = [
            f"budgets: {glob!r} matches no site"
            for glob, _ in self.config.own_budgets
            if not any(fnmatchcase(site.name, glob) for site in self.sites)
        ]
        rounded = []
        if self.config.index_scores == "fp8":
            rounded.append(f"index scores of prompts are fp8, the best {self.config.candidates} blocks scored again")
        if self.config.index_cache == "fp8":
            rounded.append("index keys of learned indexers are fp8")
        return [f"  {line}" for line in (*said, *unused, *rounded)]

    def _indexers(self) -> list[str]:
        learned = sum(site.indexer == "learned" for site in self.sparse)
        said = [f"  {self.calibrated}"] if self.calibrated else []
        if own := sum(site.indexer == "own" for site in self.sparse):
            said.append(
                f"  {own} of {len(self.sparse)} sparse rows select by the model's own indexer, as it does itself"
            )
        if not learned:
            return said
        missed = f", {self.missed_selections} selections of theirs by keys" if self.missed_selections else ""
        return [*said, f"  {learned} of {len(self.sparse)} sparse rows select by a learned indexer{missed}"]

    def _savings(self) -> list[str]:
        lines = ["attention FLOPs of one prefill (products only), dense -> as decided:"]
        for length in LENGTHS:
            before, after = self.flops(length)
            ratio = before / after if after else 1.0
            name = f"{length // 1024}K" if length < 2**20 else f"{length // 2**20}M"
            lines.append(f"  {name:>5} tokens  {before:9.2e} -> {after:9.2e}  {ratio:5.1f}x")
        if any(site.indexer != "own" for site in self.sparse):
            unknown = "not evaluated on your data yet: MSA is an approximation of dense attention beyond the budget"
            lines.append(f"  {self.evaluated or unknown}")
        return lines


def site_flops(site: Site, config: MSAConfig, length: int) -> tuple[int, int]:
    """Dense and decided FLOPs of one site at one length (spec 9)."""
    width = site.query_heads * site.head_dim
    window = int(site.mask[len("window(") : -1]) if site.mask.startswith("window(") else length
    dense = 2 * width * length**2 if window >= length else 4 * width * length * window
    longest_dense = site.dense_below.keys if site.dense_below else config.resolved_dense_below()
    if site.decision == "dense" or length <= longest_dense:
        return dense, dense
    block_size, blocks = site.own_budget or (config.block_size, config.topk_blocks)
    budget = blocks * block_size
    return dense, site.key_value_heads * site.head_dim * length**2 + 4 * width * length * min(budget, length)


def build_report(
    records: Iterable[GraphRecord],
    config: MSAConfig,
    dense_calls: Mapping[str, int],
    *,
    sparsified: bool,
    evaluated: str = "",
    missed_selections: int = 0,
    calibrated: str = "",
    calibration: Mapping[str, str] | None = None,
) -> Report:
    """Put the records of all graphs together; equal rows of different graphs become one."""
    rows: dict[Site, tuple[int, ...]] = {}
    graphs = 0
    for index, record in enumerate(records):
        graphs += 1
        for site in record.sites:
            key = replace(site, graph=())
            rows[key] = (*rows.get(key, ()), index)
    sites = tuple(replace(site, graph=where) for site, where in rows.items())
    return Report(
        sites,
        config,
        graphs,
        sum(dense_calls.values()),
        sparsified,
        evaluated,
        missed_selections=missed_selections,
        calibrated=calibrated,
        calibration=calibration or {},
    )


_COLUMNS = ("site", "source", "form", "Hq/Hkv/D", "mask", "decision", "why")


def _cells(site: Site, config: MSAConfig, calibration: str = "") -> tuple[str, ...]:
    why = site.detail if site.reason is None else f"{site.reason.value}: {site.detail}"
    own = config.for_site(site.name).topk_blocks
    if site.decision == "sparse" and own != config.topk_blocks and site.own_budget is None:
        why += f"; {own} blocks"
    why += f"; {calibration}" if calibration else ""
    heads = f"{site.query_heads}/{site.key_value_heads or '?'}/{site.head_dim}"
    return (site.name or "<root>", site.source, site.form, heads, site.mask, site.decision, why)


def _rich_table(cells: Iterable[tuple[str, ...]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column in ("site", "decision", "Hq/Hkv/D"))
    for row in cells:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=150).print(table)
    return stream.getvalue()


def _plain_table(cells: Iterable[tuple[str, ...]]) -> str:
    rows = [_COLUMNS, *cells]
    widths = [max(len(row[index]) for row in rows) for index in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
