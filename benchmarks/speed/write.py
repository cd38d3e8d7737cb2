"""Results as JSON, Markdown and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import CASES
from benchmarks.speed.growth import fit_exponent
from benchmarks.speed.measure import SPARSE, Row
from benchmarks.speed.roofline import Roofline
from benchmarks.speed.setting import Work
from msa_compile.bench.spread import Spread

_KEY = ("case", "indexer", "device", "dtype", "threads", "heads", "block_size", "topk", "length")


@dataclass(frozen=True)
class Machine:
    """Where and with what something was measured; rows of different machines are never put together.

    Attributes:
        device: Name of the processor or GPU.
        kind: ``"cpu"`` or ``"cuda"``.
        cores: Of the CPU.
        torch, msa_compile: Versions.
        kernels: Hash of the sources of the ops.
    """

    device: str
    kind: str
    cores: int
    torch: str
    msa_compile: str
    kernels: str


@dataclass(frozen=True)
class Results:
    """All that a results file holds.

    Attributes:
        machine: Where.
        dates: Days of the runs, ``"2026-01-31"``.
        rows: Of the kernel cases.
        rooflines: By ``"dtype, threads"``.
        models: Of the case ``end_to_end``, as ``msa_compile.bench`` writes them.
    """

    machine: Machine
    dates: tuple[str, ...]
    rows: tuple[Row, ...]
    rooflines: Mapping[str, Roofline]
    models: tuple[Mapping[str, Any], ...] = ()

    def merged_with(self, older: Results) -> Results:
        """These results, and those of an earlier run on the same machine that they do not replace."""
        if older.machine != self.machine:
            return self
        rows = {tuple(getattr(row, name) for name in _KEY): row for row in (*older.rows, *self.rows)}
        models = {_model_key(entry): entry for entry in (*older.models, *self.models)}
        dates = tuple(sorted({*older.dates, *self.dates}))
        ordered = [rows[key] for key in sorted(rows, key=lambda key: (list(CASES).index(key[0]), *key[1:]))]
        # What a machine can do is the most that it did: rates of a busy moment would put rows above the roof.
        rooflines = {
            name: _higher(self.rooflines.get(name), older.rooflines.get(name))
            for name in {**older.rooflines, **self.rooflines}
        }
        under = tuple(_under_roof(row, rooflines.get(f"{row.dtype}, {row.threads}")) for row in ordered)
        return Results(self.machine, dates, under, rooflines, tuple(models.values()))

    def to_json(self) -> str:
        """As text."""
        return json.dumps(
            {
                "machine": asdict(self.machine),
                "dates": list(self.dates),
                "rooflines": {name: asdict(roofline) for name, roofline in self.rooflines.items()},
                "rows": [row.to_dict() for row in self.rows],
                "models": list(self.models),
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The inverse of ``to_json``."""
        kept = json.loads(text)
        return cls(
            Machine(**kept["machine"]),
            tuple(kept["dates"]),
            tuple(Row.from_dict(row) for row in kept["rows"]),
            {name: Roofline(**value) for name, value in kept["rooflines"].items()},
            tuple(kept["models"]),
        )


def _higher(one: Roofline | None, other: Roofline | None) -> Roofline:
    known = [roofline for roofline in (one, other) if roofline is not None]
    return Roofline(
        max(roofline.flops_per_second for roofline in known), max(roofline.bytes_per_second for roofline in known)
    )


def _under_roof(row: Row, roofline: Roofline | None) -> Row:
    if roofline is None or row.roofline_share is None:
        return row
    return replace(row, roofline_share=roofline.seconds(Work(row.flops, row.bytes)) / row.seconds[SPARSE].median)


def _model_key(entry: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(entry[name] for name in ("model", "layers", "dtype", "threads", "inner", "indexer"))


def write_results(results: Results, folder: Path, name: str) -> list[Path]:
    """Write ``name.json`` and ``name.md``, and ``name.png`` where matplotlib is installed; earlier rows are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{name}.json"
    if kept.exists():
        results = results.merged_with(Results.from_json(kept.read_text()))
    kept.write_text(results.to_json() + "\n")
    picture = folder / f"{name}.png"
    has_picture = draw_speed_up(results.rows, picture, results.machine.device)
    text = folder / f"{name}.md"
    text.write_text(to_markdown(results, picture.name if has_picture else None))
    return [kept, text, *([picture] if has_picture else [])]


def to_markdown(results: Results, picture: str | None) -> str:
    """The report."""
    machine = results.machine
    other = "CUDA" if machine.kind == "cpu" else "CPU"
    lines = [
        f"# Speed on {machine.device}",
        "",
        f"torch {machine.torch}, msa_compile {machine.msa_compile}, {machine.cores} cores, {', '.join(results.dates)}.",
        f"Made by `make bench`. Not run here: {other}; the same command with `--device {other.lower()}` runs it there.",
        "",
        "Within a row sparse and dense calls take turns in one process. Times are medians, ratios the medians of the",
        "ratios within a round, the middle half of them in brackets; above 1 sparse is faster. `~` was not measured,",
        "but extrapolated from the longest length that was. No ratio stands where the gate is red. *theory* is",
        "the ratio of FLOPs, for decode of bytes; *roof* the least time that the measured matrix and copy rates allow,",
        "as a share of the time taken (what only reads can be faster than a copy); memory is above the inputs.",
        "*default* is what a user gets without this package, *best* the fastest of the ways that PyTorch has. Inputs",
        "are normal random numbers.",
        "",
    ]
    if picture:
        lines += [f"![Speed-up against length]({picture})", ""]
    lines += ["| dtype, threads | matrix products, GFLOP/s | copy, read and written, GB/s |", "|---|---|---|"]
    lines += [
        f"| {name} | {roof.flops_per_second / 1e9:.0f} | {roof.bytes_per_second / 1e9:.1f} |"
        for name, roof in results.rooflines.items()
    ]
    for case in CASES.values():
        mine = [row for row in results.rows if row.case == case.name]
        lines += ["", f"## {case.name}: {case.title}", ""]
        lines += _case_table(mine) if mine else ["Not run."]
    lines += ["", "## Growth", "", *_growth_table(results.rows)]
    lines += ["", "## end_to_end: whole models", ""]
    lines += [line for entry in results.models for line in (*entry["markdown"], "")] or ["Not run."]
    return "\n".join(lines).rstrip() + "\n"


def _case_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| heads | dtype | threads | indexer | length | sparse | default | best | to default | to best | theory | roof "
        "| memory, sparse / default | gate |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = [row.heads, row.dtype, row.threads, row.indexer, _tokens(row.length)]
        default, best = row.default_baseline, row.best_baseline
        if not row.is_green or default is None or best is None:
            lines.append(_line([*head, *["-"] * 8, row.gate]))
            continue
        memory = " / ".join(_bytes(row.peak_bytes.get(name)) for name in (SPARSE, default))
        times = [_seconds(row.seconds[SPARSE]), f"{_seconds(row.seconds[default])} ({default})"]
        fastest = f"{_seconds(row.seconds[best])} ({best})"
        ratios = [_ratio(row.ratios[default]), _ratio(row.ratios[best])]
        share = f"{row.roofline_share:.0%}" if row.roofline_share is not None else "-"
        lines.append(_line([*head, *times, fastest, *ratios, f"{row.theory:.1f}x", share, memory, row.gate]))
    return lines


def _growth_table(rows: Sequence[Row]) -> list[str]:
    """Exponents of prefill time and memory; what was extrapolated is not fitted."""
    lines = [
        "Exponents of time and of memory above the inputs of `prefill`, fitted over the lengths named (log-log least",
        "squares; only what was measured).",
        "",
        "| heads | dtype | threads | which | lengths | time | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    series: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.case == "prefill" and row.is_green:
            series.setdefault((row.heads, row.dtype, row.threads), []).append(row)
    found = False
    for key, mine in series.items():
        for name in (SPARSE, "sdpa"):
            measured = [row for row in mine if name in row.seconds and not row.seconds[name].is_extrapolated]
            times = fit_exponent([(row.length, row.seconds[name].median) for row in measured])
            memory = fit_exponent([(row.length, float(row.peak_bytes.get(name) or 0)) for row in measured])
            if times is None:
                continue
            found = True
            span = f"{_tokens(measured[0].length)} to {_tokens(measured[-1].length)}"
            told = "-" if memory is None else f"{memory:.2f}"
            lines.append(_line([*key, name, span, f"{times:.2f}", told]))
    return lines if found else ["Not run."]


def draw_speed_up(rows: Iterable[Row], out: Path, device: str) -> bool:
    """Draw speed-up against length on log axes, theory dashed; returns whether there was something to draw."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    rows = list(rows)
    threads = max((row.threads for row in rows), default=0)
    drawn = [row for row in rows if row.ratios and row.threads == threads]
    panels = {name: [row for row in drawn if row.case == name] for name in ("prefill", "decode")}
    panels = {name: mine for name, mine in panels.items() if mine}
    if not panels:
        return False
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.2 * len(panels), 5.2), squeeze=False)
    for axis, (name, mine) in zip(axes[0], panels.items(), strict=True):
        series: dict[str, list[Row]] = {}
        for row in mine:
            key = f"{row.heads} {row.dtype}" + (", learned" if row.indexer == "learned" else "")
            series.setdefault(key, []).append(row)
        for index, (label, points) in enumerate(series.items()):
            color = f"C{index}"
            lengths = [row.length for row in points]
            axis.plot(lengths, [row.ratios["sdpa"].median for row in points], "o-", color=color, label=label)
            best = [row.ratios[row.best_baseline or "sdpa"].median for row in points]
            axis.plot(lengths, best, "o:", color=color, markerfacecolor="white")
            axis.plot(lengths, [row.theory for row in points], "--", color=color, alpha=0.35)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}x")
        ticks = sorted({row.length for row in mine})
        axis.set_xticks(ticks, [_tokens(length) for length in ticks])
        axis.set_xlabel("tokens")
        axis.set_ylabel("times faster than dense")
        axis.set_title(f"{name}: solid to SDPA, dotted to the best dense, dashed theory", fontsize=9)
        axis.grid(alpha=0.25, which="both")
        axis.legend(fontsize=7, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    figure.suptitle(f"{device}, {threads} threads" if threads else device, fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return True


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _seconds(spread: Spread) -> str:
    mark = "~" if spread.is_extrapolated else ""
    value = spread.median
    return f"{mark}{value:.3g} s" if value >= 1 else f"{mark}{value * 1e3:.3g} ms"


def _ratio(spread: Spread) -> str:
    if spread.is_extrapolated:
        return f"~{spread.median:.2f}x"
    return f"{spread.median:.2f}x [{spread.low:.2f}, {spread.high:.2f}]"


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f} MiB"
