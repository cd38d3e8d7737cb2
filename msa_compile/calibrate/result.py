"""What a calibration found and decided: records, the table and the picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from msa_compile.calibrate.metrics import SiteMetrics
from msa_compile.config import MSAConfig
from msa_compile.pictures import new_figure, save_figure
from msa_compile.table import to_table

_COLUMNS = (
    "site", "KL before", "KL", "block recall", "mass", "oracle's", "ratio", "keys' mass", "found", "keys' found",
    "output error", "selects by",
)  # fmt: skip
_MOST_NAMED = 12  # lines that a legend has room for


@dataclass(frozen=True)
class Bars:
    """What a branch has to reach before it is used.

    Attributes:
        min_mass_ratio: Attention mass in the selected blocks, of the mass in the best ones.
        min_found: Far blocks that matter and are selected, of those that `"keys"` selects; see `SiteMetrics.found`.
    """

    min_mass_ratio: float
    min_found: float

    def are_met(self, found: SiteMetrics) -> bool:
        """Whether a branch with these metrics is good enough."""
        return found.mass_ratio >= self.min_mass_ratio and found.found_ratio >= self.min_found


@dataclass(frozen=True)
class SiteCalibration:
    """What became of one site.

    Attributes:
        name: Module path of its owner.
        decision: What it selects by now: `"learned"`, `"keys"`, or `"dense"` where it selects nothing.
        kl_before: Of the branch as it was when the run began.
        metrics: Of the branch as it is now.
    """

    name: str
    decision: str
    kl_before: float
    metrics: SiteMetrics

    def __str__(self) -> str:
        found = self.metrics
        told = f"index branch holds {found.mass_ratio:.1%} of the attention that the best blocks hold"
        if not found.decisive:
            return told
        return f"{told} and finds {found.found:.1%} of the far blocks that matter (keys {found.keys_found:.1%})"

    def to_dict(self) -> dict[str, Any]:
        """As plain Python values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> SiteCalibration:
        """What :meth:`to_dict` made of one."""
        return cls(**{**said, "metrics": SiteMetrics(**said["metrics"])})


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration did. `print` it, or `plot` it.

    Attributes:
        sites: Those with an index branch, in the order of the model.
        stage: What was compared, see `calibrate`.
        steps: How many were done, those of earlier runs of the same checkpoint too.
        learning_rate: The highest.
        min_mass_ratio: The bar for `mass / oracle_mass`.
        min_found: The bar for `found / keys_found`.
        config: Of the model now.
        history: For each step the mean divergence of each site, nats.
        mass_history: Steps at which metrics were taken, and `mass / oracle_mass` of each site.
        dense_nll, sparse_nll: Of the held-out batches, nats a token, the sparse model as it is now; `None` where the
            model has no logits, or the calls are a loop's.
        notes: What a reader has to know to read the numbers right.
    """

    sites: tuple[SiteCalibration, ...]
    stage: str
    steps: int
    learning_rate: float
    min_mass_ratio: float
    min_found: float
    config: MSAConfig
    history: tuple[tuple[float, ...], ...]
    mass_history: tuple[tuple[int, tuple[float, ...]], ...]
    dense_nll: float | None
    sparse_nll: float | None
    notes: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The least that one has to know, in a line."""
        learned = sum(site.decision == "learned" for site in self.sites)
        mass = min(site.metrics.mass_ratio for site in self.sites)
        found = min(site.metrics.found_ratio for site in self.sites)
        return (
            f"calibrated in {self.steps} steps ({self.stage}): {learned} of {len(self.sites)} sites select by their "
            f"index branch; the least attention mass that a branch holds is {mass:.1%} of the oracle's (bar "
            f"{self.min_mass_ratio:.0%}), and the least that one finds is {found:.1%} of what keys find (bar "
            f"{self.min_found:.0%})"
        )

    def with_nll(self, dense: float, sparse: float) -> CalibrationResult:
        """This, with what the whole model loses."""
        return replace(self, dense_nll=dense, sparse_nll=sparse)

    def to_dict(self) -> dict[str, Any]:
        """As plain Python values, ready for JSON."""
        return {**asdict(self), "config": dict(self.config.__dict__)}

    def __str__(self) -> str:
        budget = f"{self.config.topk_blocks} blocks of {self.config.block_size} keys"
        lines = [
            f"MSA calibration: {self.headline}; {budget}",
            to_table(_COLUMNS, [_cells(site) for site in self.sites], left=("site", "selects by")),
            f'on held-out text. KL: of index scores from attention as "{self.stage}" compares them, nats. Shares are',
            "over queries that see more blocks than they select. The oracle takes the blocks with the most attention;",
            "block recall: share of its blocks that were selected; mass: attention inside the selected blocks; ratio:",
            "of the oracle's mass; keys' mass: what selection without a branch holds; found: of the queries that give",
            "a fifth of their attention or more to one block beyond a window of that budget, the share that selected",
            "it (-: there was none); output error: of the attention's output, relative",
        ]
        if self.dense_nll is not None and self.sparse_nll is not None:
            change = self.sparse_nll - self.dense_nll
            lines.append(f"NLL: dense {self.dense_nll:.4f}, sparse {self.sparse_nll:.4f} ({change:+.4f} nats a token)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def plot(self, path: str | Path) -> None:
        """Draw the divergence by step, and the attention mass by step and by layer, into a file (PNG, PDF, SVG).

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        draw(self, path)


def _cells(site: SiteCalibration) -> tuple[str, ...]:
    found = site.metrics
    shares = (found.recall, found.mass, found.oracle_mass, found.mass_ratio, found.keys_mass)
    return (
        site.name or "<root>",
        f"{site.kl_before:.4f}",
        f"{found.kl:.4f}",
        *(f"{share:.1%}" for share in shares),
        *(f"{share:.1%}" if found.decisive else "-" for share in (found.found, found.keys_found)),
        f"{found.output_error:.1%}",
        site.decision,
    )


def draw(result: CalibrationResult, path: str | Path) -> None:
    """Write the picture of a calibration."""
    figure, axes = new_figure(3)
    names = [site.name or "<root>" for site in result.sites]
    for place, name in enumerate(names):
        label = name if len(names) <= _MOST_NAMED else None
        axes[0].plot([row[place] for row in result.history], linewidth=1, label=label)
        steps = [step for step, _ in result.mass_history]
        axes[1].plot(steps, [100 * row[place] for _, row in result.mass_history], marker="o", linewidth=1)
    axes[0].set_yscale("log")
    axes[0].set_title("KL of index scores from attention (nats)")
    if len(names) <= _MOST_NAMED:
        axes[0].legend(frameon=False, fontsize=7)
    axes[1].set_title("attention mass, % of the oracle's")
    for axis in axes[:2]:
        axis.set_xlabel("step")
    places = range(len(names))
    for what, marker in (("oracle_mass", "_"), ("keys_mass", "x"), ("mass", "o")):
        label = {"oracle_mass": "oracle", "keys_mass": "keys", "mass": "learned"}[what]
        axes[2].plot(places, [100 * getattr(site.metrics, what) for site in result.sites], marker, label=label)
    axes[2].locator_params(axis="x", integer=True)
    axes[2].set_xlabel("layer, in the order of the model")
    axes[2].set_title("attention inside the selected blocks (%)")
    axes[2].legend(frameon=False)
    for axis in axes[1:2]:
        axis.axhline(100 * result.min_mass_ratio, color="#202124", linestyle=":")
    save_figure(figure, f"Calibration in {result.steps} steps", path)
