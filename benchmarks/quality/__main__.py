"""Does the selection find what a model needs? Small models are trained, and every selector is measured in them.

    python -m benchmarks.quality                     # writes benchmarks/results/quality.md, .json and pictures
    python -m benchmarks.quality --stop-after 240    # a piece of it; the next call goes on, and returns 0 at the end
    python -m benchmarks.quality --toy               # everything at toy size in seconds

What is done is kept under ``out/quality``: trained models, calibrated index branches and finished rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import msa_compile
from benchmarks.quality.calibrated import calibrate_once
from benchmarks.quality.draw import draw_curves, draw_maps
from benchmarks.quality.judge import Choice, Judge
from benchmarks.quality.measure import Exam, Row, examine
from benchmarks.quality.model import LanguageModel, count_parameters
from benchmarks.quality.piece import Piece, TimeIsUp, keep
from benchmarks.quality.setting import TOY, Setting
from benchmarks.quality.subjects import CALIBRATED, DENSE, SELECTORS, selecting
from benchmarks.quality.train import train
from benchmarks.quality.write import GOAL_SHARE, Results, write
from examples.byte_model import load_corpus
from msa_compile.kernels.break_even import cpu_name

UNFINISHED = 75  # exit status: call again


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or go on; what there is of results is written either way."""
    options = _parse(argv)
    setting = TOY if options.toy else Setting()
    setting = replace(setting, seeds=tuple(options.seeds or setting.seeds))
    rows: list[Row] = []
    maps: list[Choice] = []
    try:
        for found in run(setting, options.keep, Piece(options.stop_after)):
            if isinstance(found, Choice):
                maps.append(found)
            else:
                rows.append(found)
        status = 0
    except TimeIsUp:
        print("time is up; the same command goes on from here")
        status = UNFINISHED
    if rows:
        for path in _write(rows, maps, setting, options.out):
            print(f"wrote {path}")
    return status


def run(setting: Setting, kept: Path, piece: Piece) -> Iterator[Row | Choice]:
    """Train, calibrate and measure, each where an earlier run did not.

    Yields:
        Every row; and after those of the first seed, what each layer chooses in one window.
    """
    corpus = load_corpus()
    exam = Exam.on(
        corpus.held_out, setting.size.context, texts=setting.texts, prompts=setting.prompts, judged=setting.judged
    )
    for seed in setting.seeds:
        weights = kept / f"model-{setting.of_models}-{seed}.pt"
        model = train(setting.size, setting.training, corpus.train, seed, weights, piece)
        indexers = kept / f"indexers-{setting.of_indexers}-{seed}"
        for selector in (DENSE, *SELECTORS):
            is_calibrated = selector == CALIBRATED
            folder = kept / f"rows-{setting.of_rows(has_indexers=is_calibrated)}-{seed}"
            if is_calibrated:
                piece.check()
                calibrate_once(model, setting, corpus, indexers, seed)
            for share in (1,) if selector == DENSE else setting.shares:
                piece.check()
                yield _row(model, setting, exam, selector, share, seed, indexers, folder)
        if seed == setting.seeds[0]:
            yield from _maps(model, setting, exam, indexers)


def _row(
    model: LanguageModel,
    setting: Setting,
    exam: Exam,
    selector: str,
    share: int,
    seed: int,
    indexers: Path,
    folder: Path,
) -> Row:
    """The row of a selector and budget, measured or read from `folder`."""
    path = folder / f"{selector}-{share}.json".replace("/", "_").replace(", ", "_")
    if not path.exists():
        with selecting(
            model,
            selector,
            block_size=setting.block_size,
            topk=setting.topk(share),
            adapter=indexers,
            seed=seed,
        ):
            row = examine(model, exam, seed=seed, selector=selector, share=share)
        keep(path, lambda part: part.write_text(json.dumps(row.to_dict())))
        print(f"seed {seed}, {selector}, 1/{share}: perplexity {row.perplexity:.4f}, retrieval {row.retrieval:.1%}")
    return Row.from_dict(json.loads(path.read_text()))


@torch.no_grad()
def _maps(model: LanguageModel, setting: Setting, exam: Exam, indexers: Path) -> list[Choice]:
    """What each layer of a calibrated model attends to and chooses in one window with facts."""
    judge = Judge(skipped=0, stride=2)
    share = min(setting.shares, key=lambda share: abs(share - GOAL_SHARE))
    with (
        selecting(
            model,
            CALIBRATED,
            block_size=setting.block_size,
            topk=setting.topk(share),
            adapter=indexers,
            seed=0,
        ),
        judge.watching(),
    ):
        model(exam.recall.ids[:1])
    return judge.choices


def _write(rows: Sequence[Row], maps: Sequence[Choice], setting: Setting, out: Path) -> list[Path]:
    """The report and its pictures."""
    out.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": cpu_name(),
        "torch": torch.__version__,
        "msa_compile": msa_compile.__version__,
        "day": datetime.date.today().isoformat(),
    }
    results = Results(tuple(rows), machine, count_parameters(setting.size))
    pictures = []
    if results.shares:
        pictures.append(out / "quality.png")
        draw_curves(results, pictures[-1])
    if maps:
        pictures.append(out / "quality_maps.png")
        draw_maps(maps, setting.block_size, pictures[-1])
    return [*write(results, maps, setting, out, pictures), *pictures]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description="quality of block selection")
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", help="of the models (default 0 1 2)")
    add("--stop-after", type=float, default=math.inf, metavar="SECONDS", help=f"then exit with status {UNFINISHED}")
    add("--toy", action="store_true", help="toy sizes, to see that everything runs; written to out/quality")
    add("--keep", type=Path, default=Path("out/quality"), help="folder of what is done (default %(default)s)")
    add("--out", type=Path, help="folder of the results (default benchmarks/results)")
    options = parser.parse_args(argv)
    if options.out is None:
        options.out = options.keep / "toy" if options.toy else Path(__file__).parent.parent / "results"
    return options


if __name__ == "__main__":
    raise SystemExit(main())
