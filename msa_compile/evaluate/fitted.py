"""What a search for budgets found: records, the tables and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msa_compile.config import MSAConfig
from msa_compile.pictures import new_figure, save_figure
from msa_compile.table import to_table

DENSE = "dense"
_LAYER_COLUMNS = ("layer", "blocks", "keys read", "NLL with this layer alone")


@dataclass(frozen=True)
class LayerBudget:
    """One layer.

    Attributes:
        name: Path of the module that owns the attention.
        topk_blocks: Blocks a query, `None` where the layer stays dense.
        keys_read: Share of the visible keys that it reads, at the longest batch.
        alone: For each candidate that was tried, the NLL increase with this layer alone sparse; largest first.
    """

    name: str
    topk_blocks: int | None
    keys_read: float
    alone: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class FrontierPoint:
    """One setting of all layers that was measured.

    Attributes:
        name: `"all 8"` for one budget everywhere, `"by layer"` otherwise.
        topk_blocks: Of each layer, `None` where dense.
        keys_read: Share of the visible keys that all layers read together, at the longest batch.
        nll_increase: Over dense, nats a token.
    """

    name: str
    topk_blocks: tuple[int | None, ...]
    keys_read: float
    nll_increase: float


@dataclass(frozen=True)
class BudgetFit:
    """The fewest blocks a layer that keep the bar. `print` it, or `plot` it; apply `config` with `sparsify`.

    Attributes:
        config: For `sparsify`: the budgets that were found, everything else as it was.
        layers: The budget of each layer.
        frontier: Every setting that was measured, most keys first.
        nll_increase: Of `config`, measured.
        max_nll_increase: The bar.
        dense_nll: Nats a token.
        tokens: Predictions that were measured.
        longest: Tokens of the longest batch.
        notes: What a reader has to know to read the numbers right.
    """

    config: MSAConfig
    layers: tuple[LayerBudget, ...]
    frontier: tuple[FrontierPoint, ...]
    nll_increase: float
    max_nll_increase: float
    dense_nll: float
    tokens: int
    longest: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain Python values, ready for JSON."""
        return {**asdict(self), "config": dict(self.config.__dict__)}

    def __str__(self) -> str:
        rows = [
            (
                layer.name or "<root>",
                DENSE if layer.topk_blocks is None else f"{layer.topk_blocks}",
                f"{layer.keys_read:.1%}",
                ", ".join(f"{topk}: {increase:+.4f}" for topk, increase in layer.alone),
            )
            for layer in self.layers
        ]
        return "\n".join(
            [
                f"MSA budgets: NLL {self.nll_increase:+.4f} nats a token over {self.dense_nll:.4f} (bar "
                f"{self.max_nll_increase:+.4f}); {self.tokens} predictions, blocks of {self.config.block_size} keys",
                to_table(_LAYER_COLUMNS, rows, left=("layer", "NLL with this layer alone")),
                "",
                frontier_table(self.frontier, self.max_nll_increase),
                f"keys read: share of the visible keys at {self.longest} tokens. Apply it with "
                "sparsify(unsparsify(model), fit.config)",
                *(f"note: {note}" for note in self.notes),
            ]
        )

    def plot(self, path: str | Path) -> None:
        """Draw the frontier and the budget of each layer into a file (PNG, PDF, SVG).

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        draw(self, path)


def frontier_table(frontier: Sequence[FrontierPoint], bar: float) -> str:
    """Every setting that was measured, most keys first."""
    rows = [
        (
            point.name,
            f"{point.keys_read:.1%}",
            f"{point.nll_increase:+.4f}",
            "yes" if point.nll_increase <= bar else "no",
            _in_short(point.topk_blocks),
        )
        for point in sorted(frontier, key=lambda point: -point.keys_read)
    ]
    return to_table(("setting", "keys read", "NLL", "keeps the bar", "layers"), rows, left=("setting", "layers"))


def _in_short(budgets: Sequence[int | None]) -> str:
    """How many layers have which budget."""
    counts = {topk: sum(other == topk for other in budgets) for topk in budgets}
    ordered = sorted(counts, key=lambda topk: (topk is not None, topk or 0))
    return ", ".join(f"{counts[topk]} x {DENSE if topk is None else topk}" for topk in ordered)


def draw(fit: BudgetFit, path: str | Path) -> None:
    """Write the picture of a fit."""
    figure, axes = new_figure(2)
    for name, marker in (("one budget for all layers", "o"), ("by layer", "s")):
        points = sorted(
            (100 * point.keys_read, point.nll_increase)
            for point in fit.frontier
            if (point.name == "by layer") == (name == "by layer")
        )
        axes[0].plot([x for x, _ in points], [y for _, y in points], marker=marker, label=name)
    axes[0].axhline(fit.max_nll_increase, color="#202124", linestyle=":", label="bar")
    chosen = min((point for point in fit.frontier if _is_chosen(point, fit)), key=lambda point: point.keys_read)
    axes[0].plot(100 * chosen.keys_read, chosen.nll_increase, "o", ms=14, mfc="none", mec="#f28e2b", label="chosen")
    axes[0].set_xlabel(f"keys read at {fit.longest} tokens (%)")
    axes[0].set_title("NLL increase over dense (nats a token)")
    axes[0].legend(frameon=False)
    places = range(len(fit.layers))
    axes[1].bar(places, [100 * layer.keys_read for layer in fit.layers], color="#2f6db5")
    for place, layer in zip(places, fit.layers, strict=True):
        label = DENSE if layer.topk_blocks is None else str(layer.topk_blocks)
        axes[1].annotate(label, (place, 100 * layer.keys_read), ha="center", va="bottom", fontsize=8)
    axes[1].set_ylim(0, 110)
    axes[1].locator_params(axis="x", integer=True)
    axes[1].set_xlabel("layer, in the order of the model")
    axes[1].set_title("keys read (%), with the number of blocks")
    save_figure(figure, f"Budgets that keep NLL within {fit.max_nll_increase:+.4f}: {fit.nll_increase:+.4f}", path)


def _is_chosen(point: FrontierPoint, fit: BudgetFit) -> bool:
    return point.topk_blocks == tuple(layer.topk_blocks for layer in fit.layers)
