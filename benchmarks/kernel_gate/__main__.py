"""Compile every Triton kernel for every chip, without a GPU, and check what came out.

    python -m benchmarks.kernel_gate                               # a few minutes on one core; what is cached is not
    python -m benchmarks.kernel_gate --chips 90 --problems decode  # problems by the start of their names

Writes ``benchmarks/results/kernel_gate.md`` when everything was compiled. Exits with 1 if anything is not as expected.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernel_gate.compile import Compiled, compile_launch
from benchmarks.kernel_gate.expect import judge
from benchmarks.kernel_gate.problems import PROBLEMS, launches_of
from msa_compile.kernels.chip import CHIPS
from msa_compile.kernels.launch import Launch

RESULTS = Path(__file__).resolve().parent.parent / "results" / "kernel_gate.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, check, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_gate", description="compile the Triton kernels")
    parser.add_argument("--chips", default=",".join(map(str, CHIPS)), help="compute capabilities (default: all)")
    parser.add_argument("--problems", default="", metavar="START", help="problems whose name starts so (default: all)")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: there is nothing to compile")
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path("out/kernel_gate").resolve()))
    chips = [CHIPS[int(name)] for name in options.chips.split(",")]
    lines, complaints = [], []
    for chip in chips:
        for problem in PROBLEMS.values():
            if not problem.name.startswith(options.problems):
                continue
            for launch in launches_of(problem, chip):
                compiled = compile_launch(launch, chip)
                said = judge(launch, compiled, chip)
                where = f"sm_{chip.capability}, {problem.name}, {launch.kernel.__name__}"
                complaints += [f"{where}: {complaint}" for complaint in said]
                lines.append(_row(chip.capability, problem.name, launch, compiled))
                print(f"{where}: {'; '.join(said) or 'as expected'}; {lines[-1]}", flush=True)
    for complaint in complaints:
        print(f"RED {complaint}", file=sys.stderr)
    if not complaints and len(chips) == len(CHIPS) and not options.problems:
        RESULTS.write_text(_report(lines))
        print(f"wrote {RESULTS}")
    return 1 if complaints else 0


def _row(capability: int, problem: str, launch: Launch, compiled: Compiled) -> str:
    sizes = " ".join(f"{name.lower()}={size}" for name, size in launch.tile.sizes.items())
    products = ", ".join(f"{count} {name}" for name, count in compiled.products.items() if count)
    return (
        f"| sm_{capability} | {problem} | `{launch.kernel.__name__}` | {sizes} | {launch.tile.warps} "
        f"| {launch.tile.stages} | {compiled.registers} | {compiled.spilled} | {compiled.shared} | {products} "
        f"| {compiled.copies} |"
    )


def _report(lines: Sequence[str]) -> str:
    import triton

    head = [
        "# Triton kernels, compiled and not run",
        "",
        f"triton {triton.__version__}, made by `make gate`. No GPU was there: this says what the compiler made of each",
        "kernel, not how fast it is. Registers are of a thread, spills in bytes of a thread, shared memory in bytes of",
        "a program; products and copies count instructions in the program text.",
        "",
        "| chip | problem | kernel | tile | warps | stages | registers | spilled | shared | products | copies |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
