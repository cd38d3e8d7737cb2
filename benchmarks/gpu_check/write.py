"""What was found on a GPU, as JSON and Markdown, written again after every finding."""

from __future__ import annotations

import datetime
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.timing import Row
from benchmarks.speed.roofline import Roofline
from msa_compile.kernels.break_even import kernels_version

NAME = "gpu_check"


@dataclass
class Findings:
    """All that a run has found so far.

    Attributes:
        machine: Names and versions.
        roofline: Rates measured in this run.
        folder: Where files go.
        checks: By name, what is wrong; the empty text is right.
        rows, models, notes: In the order in which they came; models with their Markdown.
        is_wrong: Whether a check, or the gate of a row or a model, was red.
    """

    machine: dict[str, str]
    roofline: Roofline
    folder: Path
    checks: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_wrong: bool = False

    @classmethod
    def of(cls, device: torch.device, roofline: Roofline, folder: Path, *, is_dry: bool) -> Findings:
        """Nothing found yet."""
        import triton

        machine = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "kernels": kernels_version("cuda"),
            "date": datetime.date.today().isoformat(),
        }
        findings = cls(machine, roofline, folder)
        if is_dry:
            findings.notes.append("A dry run, interpreted on a CPU: nothing here says anything of speed.")
        return findings

    def add_check(self, name: str, wrong: str) -> None:
        """Keep what a check of correctness said."""
        self.checks[name] = wrong
        self._write(is_red=bool(wrong))

    def add_row(self, row: Row) -> None:
        """Keep a row of the tables."""
        self.rows.append(row)
        self._write(is_red=not row.gate.startswith("green"))

    def add_model(self, is_green: bool, result: dict[str, Any], markdown: list[str]) -> None:
        """Keep the result of a whole model."""
        self.models.append({**result, "markdown": markdown})
        self._write(is_red=not is_green)

    def add_note(self, text: str) -> None:
        """Keep something that a reader has to know."""
        self.notes.append(text)
        self._write(is_red=False)

    def _write(self, *, is_red: bool) -> None:
        self.is_wrong = self.is_wrong or is_red
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {
            "machine": self.machine,
            "roofline": asdict(self.roofline),
            "checks": self.checks,
            "rows": [row.to_dict() for row in self.rows],
            "models": self.models,
            "notes": self.notes,
        }
        (self.folder / f"{NAME}.json").write_text(json.dumps(kept, indent=1, default=str) + "\n")
        (self.folder / f"{NAME}.md").write_text(self._to_markdown())

    def _to_markdown(self) -> str:
        wrong = {name: said for name, said in self.checks.items() if said}
        lines = [
            f"# The Triton kernels on {self.machine['device']}",
            "",
            "Made by `python -m benchmarks.gpu_check`: "
            + ", ".join(f"{name} {value}" for name, value in self.machine.items() if name != "device")
            + ".",
            "",
            f"Measured in the same run: {self.roofline.flops_per_second / 1e12:.0f} TFLOP/s of a bfloat16 product, "
            f"{self.roofline.bytes_per_second / 1e9:.0f} GB/s read and written by a copy.",
            "",
            f"Correctness against float64: {len(self.checks) - len(wrong)} of {len(self.checks)} checks right.",
            *(f"- WRONG {name}: {said}" for name, said in wrong.items()),
            "",
            "Times are medians in milliseconds, with a cold L2 cache, selection included; decode as a CUDA graph, in",
            "brackets as a call. *dense* is the faster of PyTorch's flash and cuDNN attention; `~` was scaled up from",
            "8,192 queries. *blocks* is the mean number of different blocks of a tile of queries, *orders* what",
            "attention takes by tiles and with blocks outside, and selection in two kernels where one does it.",
            "*roof* is the least time that the rates above allow, as a share of the time taken. The backward rows are",
            "the gradients alone, given the blocks; those of the index loss the loss and its gradients, over all keys",
            "or over blocks that are given.",
        ]
        for case in ("prefill", "decode", "backward", "index loss"):
            lines += ["", f"## {case}", "", *self._table(case)]
        lines += ["", "## Whole models", ""]
        lines += [line for model in self.models for line in (*model["markdown"], "")] or ["Not run.", ""]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"

    def _table(self, case: str) -> list[str]:
        rows = [row for row in self.rows if row.case == case]
        if not rows:
            return ["Not run."]
        lines = [
            "| heads | batch | length | indexer | selection | blocks | kernels | orders | sparse | dense | speed-up "
            "| roof | TFLOP/s | GB/s | gate |",
            "|" + "---|" * 15,
        ]
        return lines + [_cells(row) for row in rows]


def _cells(row: Row) -> str:
    kernels = ", ".join(f"{name} {seconds * 1e3:.3f}" for name, seconds in row.kernels.items())
    orders = ", ".join(f"{name} {seconds * 1e3:.3f}" for name, seconds in row.orders.items()) or "-"
    called = f"{row.seconds * 1e3:.3f}"
    sparse = called if row.graph_seconds is None else f"{row.graph_seconds * 1e3:.3f} ({called})"
    fastest = min(row.dense, key=lambda name: row.dense[name], default=None)
    dense = "-" if fastest is None else f"{'~' * row.is_dense_sampled}{row.dense[fastest] * 1e3:.3f} {fastest}"
    blocks = "-" if row.blocks_a_tile is None else f"{row.blocks_a_tile:.1f} of {row.queries_a_tile} queries"
    speed_up = "-" if row.speed_up is None else f"{row.speed_up:.2f}x"
    cells = (
        row.heads,
        str(row.batch),
        str(row.length),
        row.indexer,
        row.selection,
        blocks,
        kernels,
        orders,
        sparse,
        dense,
        speed_up,
        f"{row.roofline_share:.0%}",
        f"{row.flops_per_second / 1e12:.0f}",
        f"{row.bytes_per_second / 1e9:.0f}",
        row.gate,
    )
    return "| " + " | ".join(cells) + " |"
