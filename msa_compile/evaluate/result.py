"""What an evaluation found: records, the table and the picture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msa_compile.config import MSAConfig
from msa_compile.pictures import new_figure, save_figure
from msa_compile.table import to_table


@dataclass(frozen=True)
class Bucket:
    """Predictions that stand in one range of positions. Every mean is over its tokens, in nats where it has a unit.

    Attributes:
        start, stop: Real tokens before the one that predicts: `start <= position < stop`.
        tokens: Predictions that count.
        dense_nll, sparse_nll: Mean negative log-likelihood.
        nll_error: Standard error of the mean change, as if tokens were independent.
        agreement: Share of predictions whose best token is the same.
        kl: Mean KL divergence of the sparse from the dense distribution, `KL(dense || sparse)`.
    """

    start: int
    stop: int
    tokens: int
    dense_nll: float
    sparse_nll: float
    nll_error: float
    agreement: float
    kl: float

    @property
    def nll_change(self) -> float:
        """What sparse attention costs, in nats a token; negative where it is the better one."""
        return self.sparse_nll - self.dense_nll


@dataclass(frozen=True)
class ProbeResult:
    """One probe of retrieval at one length.

    Attributes:
        name: `"needle"`, `"multi-key"` or `"variable-tracking"`.
        length: Tokens of a prompt, its answer included.
        answers: Tokens that had to be found, over all prompts.
        dense, sparse: Share of them that is the model's best token.
        kept: Of those that the dense model finds, the share that the sparse one finds; `None` if it finds none.
        chance: What guessing gives.
    """

    name: str
    length: int
    answers: int
    dense: float
    sparse: float
    kept: float | None
    chance: float

    @property
    def is_informative(self) -> bool:
        """Whether the dense model finds more than guessing explains (three standard deviations)."""
        return self.dense > self.chance + 3 * math.sqrt(self.chance * (1 - self.chance) / self.answers)


@dataclass(frozen=True)
class Evaluation:
    """Dense against sparse on the same tokens. `print` it, or `plot` it.

    Attributes:
        total: Every prediction that counts.
        buckets: The same by position, ascending; empty ranges are left out.
        probes: Of retrieval, where lengths were given.
        config: Of the sparse model.
        batches: How many were compared.
        notes: What a reader has to know to read the numbers right.
    """

    total: Bucket
    buckets: tuple[Bucket, ...]
    probes: tuple[ProbeResult, ...]
    config: MSAConfig
    batches: int
    notes: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The least that one has to know, in a line."""
        total = self.total
        return (
            f"evaluated on {total.tokens} predictions: NLL {total.nll_change:+.4f} nats a token (+/- "
            f"{total.nll_error:.4f}), the same best token {total.agreement:.1%} of the time"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain Python values, ready for JSON."""
        return {**asdict(self), "config": dict(self.config.__dict__)}

    def __str__(self) -> str:
        lines = [
            f"MSA evaluation: {self.total.tokens} predictions of {self.batches} batch(es), dense against "
            f"{_budget(self.config)}",
            to_table(_COLUMNS, [_cells(bucket) for bucket in (*self.buckets, self.total)], left=("position",)),
            "nll: nats a token; same top-1: share of equal best tokens; KL(dense || sparse) of the next token, nats",
        ]
        if self.probes:
            rows = [_probe_cells(probe) for probe in self.probes]
            lines += ["", to_table(_PROBE_COLUMNS, rows, left=("probe", "reading")), *_PROBE_LEGEND]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def plot(self, path: str | Path) -> None:
        """Draw the NLL change, the agreement and the KL by position, and the probes, into a file (PNG, PDF, SVG).

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        draw(self, path)


_COLUMNS = ("position", "tokens", "dense nll", "sparse nll", "change", "+/-", "perplexity", "same top-1", "KL")
_PROBE_COLUMNS = ("probe", "length", "answers", "chance", "dense", "sparse", "kept", "reading")
_PROBE_LEGEND = (
    "probes: share of answer tokens that are the model's best token, the answer so far being given; kept: of those",
    "that dense finds, what sparse finds too. What dense does not find, sparse cannot be blamed for.",
)


def _budget(config: MSAConfig) -> str:
    own = ", some sites with a budget of their own" if config.budgets else ""
    return f"{config.topk_blocks} blocks of {config.block_size} keys{own}"


def _cells(bucket: Bucket) -> tuple[str, ...]:
    return (
        f"{bucket.start} to {bucket.stop - 1}",
        f"{bucket.tokens}",
        f"{bucket.dense_nll:.4f}",
        f"{bucket.sparse_nll:.4f}",
        f"{bucket.nll_change:+.4f}",
        f"{bucket.nll_error:.4f}",
        f"{math.expm1(min(bucket.nll_change, 700.0)):+.2%}",
        f"{bucket.agreement:.2%}",
        f"{bucket.kl:.2e}",
    )


def _probe_cells(probe: ProbeResult) -> tuple[str, ...]:
    reading = "" if probe.is_informative else "dense is at chance: says nothing of sparse"
    kept = "" if probe.kept is None else f"{probe.kept:.1%}"
    shares = (f"{probe.chance:.1%}", f"{probe.dense:.1%}", f"{probe.sparse:.1%}", kept)
    return (probe.name, f"{probe.length}", f"{probe.answers}", *shares, reading)


def draw(evaluation: Evaluation, path: str | Path) -> None:
    """Write the picture of an evaluation."""
    panels = 4 if evaluation.probes else 3
    figure, axes = new_figure(panels)
    buckets = evaluation.buckets
    places = list(range(len(buckets)))
    names = [f"{bucket.start}\u2013{bucket.stop - 1}" for bucket in buckets]
    change = [bucket.nll_change for bucket in buckets]
    error = [bucket.nll_error for bucket in buckets]
    axes[0].errorbar(places, change, yerr=error, marker="o", capsize=3)
    axes[0].axhline(0.0, color="#9aa0a6", linewidth=1)
    axes[0].set_title("NLL change, sparse \u2212 dense (nats a token)")
    axes[1].plot(places, [100 * bucket.agreement for bucket in buckets], marker="o")
    axes[1].set_title("same best token (%)")
    axes[2].plot(places, [bucket.kl for bucket in buckets], marker="o")
    axes[2].set_title("KL(dense || sparse) (nats)")
    for axis in axes[:3]:
        axis.set_xticks(places, names, rotation=35, ha="right")
        axis.set_xlabel("position (tokens before)")
    if evaluation.probes:
        _draw_probes(evaluation, axes[3])
    title = f"Dense against {_budget(evaluation.config)}, {evaluation.total.tokens} predictions"
    save_figure(figure, title, path)


def _draw_probes(evaluation: Evaluation, axis: Any) -> None:
    probes = evaluation.probes
    width = 0.38
    for offset, name in ((-width / 2, "dense"), (width / 2, "sparse")):
        heights = [100 * getattr(probe, name) for probe in probes]
        axis.bar([place + offset for place in range(len(probes))], heights, width, label=name)
    for place, probe in enumerate(probes):
        axis.hlines(100 * probe.chance, place - width, place + width, color="#202124", linestyle=":")
    axis.set_xticks(range(len(probes)), [f"{probe.name}\n{probe.length}" for probe in probes], rotation=35, ha="right")
    axis.set_ylim(0, 105)
    axis.set_title("answer tokens found (%); dotted: chance")
    axis.legend(frameon=False, loc="upper right")
