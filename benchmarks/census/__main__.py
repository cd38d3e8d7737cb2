"""``python -m benchmarks.census``: check every causal language model of transformers and write the table."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from benchmarks.census.architectures import names
from benchmarks.census.check import Row, check_architecture

RESULTS = Path(__file__).parents[1] / "results"
TIME_LIMIT = 1500.0  # seconds for one architecture; qwen4_exp selects tokens in a loop over rows and queries
_HEAD = """# Census: every causal language model of transformers

torch {torch}, transformers {transformers}, {cpu} CPU, float32, tiny random weights, `inner="eager"`, blocks of 4 keys,
`dense_below=0`. Made by `make census`.

- *calls*: attention calls of one forward, counted in eager mode without the package; *missed*: those that the report
  says nothing of.
- *padded*, *dynamic*, *static*: every block is selected. Largest difference of the logits of a left-padded batch to
  those of the untouched model; greedy tokens that differ, with a dynamic and with a static cache.
- *few blocks*, *with cache*: 3 blocks. Largest difference of the logits to an independent oracle, in one prefill; in a
  left-padded prefill with a cache and two decode steps.
- `-`: the untouched model does not do it either; `census.json` has the reason.

"""


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.census", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; default all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--keep", action="store_true", help="take what is not named here from the last results")
    options = parser.parse_args()
    rows = _last_results() if options.keep else {}
    for row in _run(options.names or names(), options.jobs):
        rows[row.name] = row
        _write([rows[name] for name in sorted(rows)])
    print(_totals([rows[name] for name in sorted(rows)]))
    print(f"wrote {(RESULTS / 'census.md').relative_to(Path.cwd())}")


def _write(rows: list[Row]) -> None:
    RESULTS.mkdir(exist_ok=True)
    fields = [{key: value for key, value in row.to_dict().items() if key not in ("missed", "right")} for row in rows]
    (RESULTS / "census.json").write_text(json.dumps(fields, indent=1) + "\n")
    (RESULTS / "census.md").write_text(_markdown(rows))


def _last_results() -> dict[str, Row]:
    return {row["name"]: Row(**row) for row in json.loads((RESULTS / "census.json").read_text())}


def _run(wanted: list[str], jobs: int) -> Iterator[Row]:
    """Each architecture in a process of its own: what one leaves in Dynamo's caches does not reach the next."""
    context: Any = multiprocessing.get_context("fork")
    pending = list(reversed(wanted))
    running: dict[Connection, tuple[str, multiprocessing.Process, float]] = {}
    with tqdm(total=len(wanted), unit="model") as bar:
        while pending or running:
            while pending and len(running) < jobs:
                name = pending.pop()
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(name, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (name, process, time.monotonic())
            ready = wait(list(running), timeout=1.0)
            for pipe in list(running):
                name, process, started = running[pipe]
                late = time.monotonic() - started > TIME_LIMIT
                if pipe not in ready and not late:
                    continue
                try:
                    row = pipe.recv() if pipe in ready else Row(name, failure=f"no answer in {TIME_LIMIT:.0f} s")
                except EOFError:
                    row = Row(name, failure="the process died")
                process.kill()
                process.join()
                del running[pipe]
                bar.update()
                if not row.right:
                    bar.write(f"{name}: {row.failure or row.errors} missed {row.missed}")
                yield row


def _work(name: str, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    pipe.send(check_architecture(name))


def _markdown(rows: list[Row]) -> str:
    head = _HEAD.format(torch=torch.__version__, transformers=transformers.__version__, cpu=platform.machine())
    table = [
        "| architecture | GQA | calls | sparse | dense, with reason | missed | forms | padded | dynamic | static "
        "| few blocks | with cache | right |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
    ]
    return head + _totals(rows) + "\n" + "\n".join(table) + "\n"


def _line(row: Row) -> str:
    checks = ("padded", "dynamic", "static", "few blocks", "few blocks, cache")
    shown = [f"{row.errors[check]:.1g}" if check in row.errors else "-" for check in checks]
    dense = ", ".join(f"{count} {reason}" for reason, count in row.dense.items())
    forms = "; ".join(row.forms)
    verdict = "yes" if row.right else f"**no** {row.failure}"
    cells = [row.name, "yes" if row.grouped else "", row.counted, row.sparse, dense, row.missed, forms, *shown, verdict]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _totals(rows: list[Row]) -> str:
    built = [row for row in rows if row.built]
    grouped = [row for row in built if row.grouped and row.counted]
    # A sliding window is no full attention; everything else that is dense is an exception to be argued.
    whole = [row for row in grouped if row.right and set(row.dense) <= {"sliding_window"}]
    others = [f"{row.name} ({', '.join(row.dense) or row.failure})" for row in grouped if row not in whole]
    reasons = Counter[str]()
    for row in built:
        reasons.update(row.dense)
    lines = [
        f"- {len(rows)} architectures, {len(built)} built, {sum(row.right for row in built)} right, "
        f"{sum(row.missed for row in built)} attention calls missed.",
        f"- {len(grouped)} with grouped heads; in {len(whole)} every full-attention site is sparse. The others: "
        + ", ".join(others)
        + ".",
        f"- Sites: {sum(row.sparse for row in built)} sparse; dense: "
        + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        + ".",
        "- Not built: " + ", ".join(f"{row.name} ({row.failure})" for row in rows if row not in built) + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
