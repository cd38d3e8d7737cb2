"""``python -m benchmarks.grammar``: check thousands of spellings of attention and write the tally."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.grammar.check import Outcome, check_seed, quiet
from benchmarks.grammar.spellings import Spelling, draw

RESULTS = Path(__file__).parents[1] / "results"
_HEAD = """# Grammar: random spellings of attention

{count} sentences (seeds {first} to {last}), torch {torch}, {cpu} CPU, float32, {minutes:.0f} minutes. Made by
`make grammar`. Each is captured once and rewritten twice: with every block selected its output has to be that of the
untouched module, with two blocks of four keys that of an independent oracle, within 1e-4. What has to stay dense
(a window, no mask, a bias) has to be refused.

- {sparse} sparse, {dense} dense, {wrong} wrong.
- Largest difference with every block {every:.1g}, with few blocks {few:.1g}.
"""


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grammar", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="sentences")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    options = parser.parse_args()
    started = time.perf_counter()
    seeds = range(options.first, options.first + options.count)
    outcomes: list[tuple[Spelling, Outcome | None, str]] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs, quiet, maxtasksperchild=200) as pool:
        for seed, outcome, error in tqdm(pool.imap_unordered(check_seed, seeds), total=len(seeds), unit="spelling"):
            spelling = draw(seed)
            outcomes.append((spelling, outcome, error or (outcome.wrong if outcome else "")))
            if outcomes[-1][2]:
                tqdm.write(f"{seed}: {outcomes[-1][2]}: {spelling}")
    RESULTS.mkdir(exist_ok=True)
    text = _markdown(outcomes, seeds, (time.perf_counter() - started) / 60)
    (RESULTS / "grammar.md").write_text(text)
    print(text)


def _markdown(outcomes: list[tuple[Spelling, Outcome | None, str]], seeds: range, minutes: float) -> str:
    done = [outcome for _, outcome, _ in outcomes if outcome is not None]
    decisions = Counter(outcome.site.decision for outcome in done if outcome.site)
    text = _HEAD.format(
        count=len(seeds), first=seeds[0], last=seeds[-1], torch=torch.__version__, cpu=platform.machine(),
        minutes=minutes, sparse=decisions["sparse"], dense=decisions["dense"],
        wrong=sum(bool(wrong) for *_, wrong in outcomes), every=max(outcome.every for outcome in done),
        few=max(outcome.few for outcome in done),
    )  # fmt: skip
    reasons = Counter(outcome.site.reason.value for outcome in done if outcome.site and outcome.site.reason)
    text += "- Dense by reason: " + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) + ".\n"
    rows = Counter[tuple[str, str, str]]()
    for spelling, outcome, wrong in outcomes:
        verdict = "wrong" if wrong or outcome is None or outcome.site is None else outcome.site.decision
        rows.update((name, str(value), verdict) for name, value in asdict(spelling).items())
    text += "\n| part | word | sparse | dense | wrong |\n|---|---|---|---|---|\n"
    for name, value in dict.fromkeys((name, value) for name, value, _ in sorted(rows)):
        counts = " | ".join(str(rows[name, value, verdict]) for verdict in ("sparse", "dense", "wrong"))
        text += f"| {name} | {value} | {counts} |\n"
    return text


if __name__ == "__main__":
    main()
