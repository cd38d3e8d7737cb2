"""Pictures: each measure against the budget, and attention maps as in the paper's appendix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.judge import Choice, is_chosen
from benchmarks.quality.measure import Row
from benchmarks.quality.selectors import BLOCK_SCORES
from benchmarks.quality.subjects import SELECTORS
from benchmarks.quality.write import GOAL_SHARE, Results, mass_ratio


def draw_curves(results: Results, out: Path) -> None:
    """Four measures against the share of the keys, a line for each selector: mean over seeds, least and greatest."""
    pyplot = _pyplot()
    panels: list[tuple[str, Callable[[Row], float], str]] = [
        ("perplexity above dense, %", lambda row: 100 * (results.perplexity_ratio(row) - 1), "symlog"),
        ("retrieval, of dense", results.kept_retrieval, "linear"),
        ("attention mass, of the oracle's", mass_ratio, "linear"),
        ("error of the attention output", lambda row: row.mean("output_error"), "log"),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.6))
    for axis, (title, value, scale) in zip(axes, panels, strict=True):
        for index, selector in enumerate(SELECTORS):
            shares = [share for share in results.shares if results.of(selector, share)]
            values = [torch.tensor([value(row) for row in results.of(selector, share)]) for share in shares]
            means = [float(part.mean()) for part in values]
            spread = [[mean - float(part.min()) for mean, part in zip(means, values, strict=True)]]
            spread += [[float(part.max()) - mean for mean, part in zip(means, values, strict=True)]]
            style = "--" if selector in BLOCK_SCORES else "-"
            axis.errorbar(shares, means, yerr=spread, fmt=f"o{style}", color=f"C{index}", label=selector, capsize=2)
        axis.set_xscale("log", base=2)
        axis.set_yscale(scale)
        axis.set_xticks(results.shares, [f"1/{share}" for share in results.shares])
        axis.axvline(GOAL_SHARE, color="black", linewidth=0.6, linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("share of the keys")
        axis.grid(alpha=0.25, which="both")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    _save(figure, out)


def draw_maps(choices: Sequence[Choice], block_size: int, out: Path) -> None:
    """Where attention goes and what is chosen, block by block: a column for each layer and group.

    Args:
        choices: One for each layer, of a call with one sequence.
        block_size: Keys in a block.
        out: The PNG.
    """
    pyplot = _pyplot()
    columns = [(layer, group) for layer, choice in enumerate(choices) for group in range(choice.ids.shape[1])]
    figure, axes = pyplot.subplots(2, len(columns), figsize=(3.1 * len(columns), 6.6), squeeze=False)
    for column, (layer, group) in enumerate(columns):
        choice = choices[layer]
        own = choice.rows // block_size
        mass = _by_block(choice.mass[0, group], own).clamp(min=1e-4).log10()
        chosen = _by_block(is_chosen(choice.ids[0, group], choice.mass.shape[3]).float(), own)
        axes[0][column].imshow(mass.numpy(), cmap="magma", vmin=-4, vmax=0, interpolation="nearest")
        axes[1][column].imshow(chosen.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes[0][column].set_title(f"layer {layer}, group {group}", fontsize=10)
        axes[1][column].set_xlabel("key block")
    axes[0][0].set_ylabel("attention mass (log)\nquery block")
    axes[1][0].set_ylabel("share of queries that chose it\nquery block")
    figure.tight_layout()
    _save(figure, out)


def _by_block(per_query: Tensor, own: Tensor) -> Tensor:
    """Mean over the queries of a block, ``[N, N]`` from ``[Q, N]``."""
    blocks = per_query.shape[1]
    total = torch.zeros(blocks, blocks).index_add_(0, own, per_query)
    return total / torch.bincount(own, minlength=blocks).clamp(min=1)[:, None]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, out: Path) -> None:
    figure.savefig(out, dpi=90, metadata={"Software": None})
    _pyplot().close(figure)
