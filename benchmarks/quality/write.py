"""Write what was measured as JSON and Markdown; every sentence with a number in it is made from the rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.judge import Choice, is_chosen
from benchmarks.quality.measure import Row, few_facts, many_facts
from benchmarks.quality.setting import Setting
from benchmarks.quality.subjects import CALIBRATED, DENSE, KEYS, SELECTORS

GOAL_SHARE, MOST_ABOVE, LEAST_KEPT, GOOD_DENSE = 16, 0.01, 0.99, 0.95

INTRO = """# Quality of what is selected

Made by `make quality` (`python -m benchmarks.quality`). {machine}, {day}; float32.

{models}, trained from scratch: {parameters} parameters, {layers} layers,
{heads}, {training}, sequences up to {length}. Half of what they read is the
Python standard library's own sources, byte by byte; the other half is the same text with facts hidden in it, a key and
a value of one symbol each, which are asked for again later.

Measured on sequences of {length} tokens with blocks of {block} keys: *perplexity* a byte of {texts} held-out windows,
over their second half; *needles* and *recall*, the share of answers found when few ({few}) or many ({many}) facts at
random depth are all asked for at the end; *retrieval* is the mean of the two. Every query of every layer reads the same
number of blocks, its own included, wherever it stands.

*Mass* is the true attention mass in the chosen blocks, as a share of the mass in the oracle's; *blocks* the share of
the oracle's blocks that were chosen (own blocks, which nobody misses, left out); *error* the relative error of the
attention output. These three are taken on the dense model's own states: every eighth query of the second half of
{judged} windows of text, mean over layers. A cell is the mean over seeds; in brackets the least and the greatest.

`keys` and `learned` are the product, through `sparsify`; calibration is `msa_compile.calibrate`, {calibration} of
training data, learning rate {rate:g}. The others, which `benchmarks/quality/selectors.py` describes, choose the blocks
of the same op. [calibration_losses.md](calibration_losses.md) compares what calibration can learn from.
"""


@dataclass(frozen=True)
class Results:
    """All rows of a run.

    Attributes:
        rows: Dense ones too.
        machine: Name of the processor, versions, day.
        parameters: Of a model.
    """

    rows: tuple[Row, ...]
    machine: Mapping[str, str]
    parameters: int

    def of(self, selector: str, share: int) -> list[Row]:
        """The rows of a selector at a budget, one a seed."""
        return [row for row in self.rows if row.selector == selector and row.share == share]

    def dense(self, seed: int) -> Row:
        """What the rows of a seed are compared with."""
        return next(row for row in self.rows if row.selector == DENSE and row.seed == seed)

    def perplexity_ratio(self, row: Row) -> float:
        """To dense."""
        return row.perplexity / self.dense(row.seed).perplexity

    def kept_retrieval(self, row: Row) -> float:
        """Of what dense finds."""
        dense = self.dense(row.seed).retrieval
        return row.retrieval / dense if dense else 0.0

    @property
    def shares(self) -> list[int]:
        """Budgets, the largest first."""
        return sorted({row.share for row in self.rows if row.selector != DENSE})


def write(
    results: Results, maps: Sequence[Choice], setting: Setting, folder: Path, pictures: Sequence[Path]
) -> list[Path]:
    """Write ``quality.json`` and ``quality.md``, which shows the pictures."""
    data, text = folder / "quality.json", folder / "quality.md"
    rows = [row.to_dict() for row in results.rows]
    data.write_text(json.dumps({"machine": dict(results.machine), "rows": rows}, indent=1) + "\n")
    text.write_text(to_markdown(results, maps, setting, [picture.name for picture in pictures]))
    return [data, text]


def to_markdown(results: Results, maps: Sequence[Choice], setting: Setting, pictures: Sequence[str]) -> str:
    """The report."""
    size, training = setting.size, setting.training
    seeds = sorted({row.seed for row in results.rows})
    machine = results.machine
    intro = INTRO.format(
        machine=f"{machine['processor']}, torch {machine['torch']}, msa_compile {machine['msa_compile']}",
        day=machine["day"],
        models="One small language model for each seed" if len(seeds) > 1 else "One small language model",
        parameters=f"{results.parameters:,}",
        layers=size.layers,
        heads=f"{size.query_heads} query heads of {size.head_dim} on {size.groups} key/value heads",
        training=f"{training.steps:,} steps of {training.tokens:,} tokens",
        length=f"{size.context:,}",
        block=setting.block_size,
        texts=setting.texts,
        few=few_facts(size.context),
        many=many_facts(size.context),
        judged=setting.judged,
        calibration=f"{setting.calibration_steps} steps of two sequences",
        rate=setting.calibration_rate,
    )
    lines = [intro, "## Dense", "", *_dense_table(results, seeds), ""]
    lines += [f"## Goal, at 1/{GOAL_SHARE} of the keys", "", *_verdict(results), ""]
    for picture in pictures:
        lines += [f"![{picture}]({picture})", ""]
    for share in results.shares:
        lines += [f"## 1/{share} of the keys: {setting.topk(share)} blocks a query", "", *_table(results, share), ""]
    lines += ["## Calibrated, layer by layer", "", *_layer_table(results), ""]
    lines += ["## Attention maps", "", *_map_table(maps, setting.block_size)]
    return "\n".join(lines).rstrip() + "\n"


def _map_table(choices: Sequence[Choice], block_size: int) -> list[str]:
    """Sink, diagonal and stripes in the choices of each layer."""
    if not choices:
        return ["Not drawn yet."]
    lines = [
        "One window with facts, first seed, calibrated. *First block*: share of the queries that chose it, where it is",
        "not their own. *Near*: of the other chosen blocks, own ones left out, those just before the own. *Shared*: of",
        "those chosen by any group, the ones chosen by all; *by chance*, if each group drew as many blindly.",
        "",
        "| layer | first block | near | shared | by chance |",
        "|---|---|---|---|---|",
    ]
    for layer, choice in enumerate(choices):
        own = choice.rows // block_size
        chosen = is_chosen(choice.ids[0], choice.mass.shape[3])[:, own > 1]
        own = own[own > 1]
        first = chosen[..., 0].float().mean()
        far = chosen.scatter(-1, own[None, :, None].expand(len(chosen), -1, 1), False)[..., 1:]
        near = far.gather(-1, (own - 2)[None, :, None].expand(len(chosen), -1, 1)).sum() / far.sum().clamp(min=1)
        shared = far.all(0).sum() / far.any(0).sum().clamp(min=1)
        drawn = far.sum(-1) / (own - 1)  # [Hkv, Q], share of the blocks that there were
        by_chance = ((own - 1) * drawn.prod(0)).sum() / ((own - 1) * (1 - (1 - drawn).prod(0))).sum().clamp(min=1)
        lines.append(_line([layer, *(f"{float(part):.0%}" for part in (first, near, shared, by_chance))]))
    return lines


def keeps_goal(results: Results, row: Row) -> bool:
    """Whether perplexity and retrieval of a row are as good as the goal asks."""
    return results.perplexity_ratio(row) <= 1 + MOST_ABOVE and results.kept_retrieval(row) >= LEAST_KEPT


def _dense_table(results: Results, seeds: Sequence[int]) -> list[str]:
    lines = ["| seed | perplexity | needles | recall | good enough |", "|---|---|---|---|---|"]
    for seed in seeds:
        row = results.dense(seed)
        good = "yes" if row.retrieval > GOOD_DENSE else f"no: retrieval not over {GOOD_DENSE:.0%}"
        lines.append(_line([seed, f"{row.perplexity:.3f}", f"{row.needles:.1%}", f"{row.recall:.1%}", good]))
    return lines


def _verdict(results: Results) -> list[str]:
    rows = results.of(CALIBRATED, GOAL_SHARE)
    if not rows:
        return ["Not measured."]
    of_keys = {row.seed: row for row in results.of(KEYS, GOAL_SHARE)}
    above = [results.perplexity_ratio(row) - 1 for row in rows]
    kept = [results.kept_retrieval(row) for row in rows]
    more = [row.perplexity / of_keys[row.seed].perplexity - 1 for row in rows]
    found = [row.retrieval - of_keys[row.seed].retrieval for row in rows]
    claims = [
        (f"Perplexity within {MOST_ABOVE:.0%} of dense", [part <= MOST_ABOVE for part in above], f"{max(above):+.2%}"),
        (f"Retrieval at least {LEAST_KEPT:.0%} of dense", [part >= LEAST_KEPT for part in kept], f"{min(kept):.1%}"),
        ("Perplexity not above `keys`", [part <= 0 for part in more], f"{max(more):+.2%}"),
        ("Retrieval not below `keys`", [part >= 0 for part in found], f"{100 * min(found):+.1f} points"),
    ]
    lines = ["Calibrated:", ""]
    lines += [f"- {claim}: {_yes(passed)}; worst seed {worst}." for claim, passed, worst in claims]
    lines += ["", "On the way:", ""]
    for selector in (CALIBRATED, KEYS):
        lines.append(f"- {_breaking_point(results, selector)}")
    return lines


def _breaking_point(results: Results, selector: str) -> str:
    """Up to which budget a selector keeps the goal in every seed, and how it goes on from there."""
    measured = [share for share in results.shares if results.of(selector, share)]
    kept = list(
        itertools.takewhile(
            lambda share: all(keeps_goal(results, row) for row in results.of(selector, share)), measured
        )
    )
    start = f"`{selector}` keeps perplexity and retrieval in every seed "
    start += f"down to 1/{kept[-1]} of the keys" if kept else "at no budget"
    after = measured[len(kept) :]
    steps = [
        f"1/{share}: perplexity {_mean(map(results.perplexity_ratio, results.of(selector, share))) - 1:+.1%}, "
        f"retrieval {_mean(map(results.kept_retrieval, results.of(selector, share))):.0%} of dense"
        for share in after
    ]
    return start + (f". After that, mean over seeds: {'; '.join(steps)}." if steps else ".")


def _table(results: Results, share: int) -> list[str]:
    lines = [
        "| selector | perplexity, to dense | needles | recall | retrieval, of dense | mass | blocks | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for selector in SELECTORS:
        rows = results.of(selector, share)
        if not rows:
            lines.append(_line([selector, *["not measured"] * 7]))
            continue
        lines.append(
            _line(
                [
                    selector,
                    _spread((results.perplexity_ratio(row) - 1 for row in rows), "+.2%"),
                    _spread((row.needles for row in rows), ".1%"),
                    _spread((row.recall for row in rows), ".1%"),
                    _spread((results.kept_retrieval(row) for row in rows), ".1%"),
                    _spread((mass_ratio(row) for row in rows), ".1%"),
                    _spread((row.mean("block_recall") for row in rows), ".0%"),
                    _spread((row.mean("output_error") for row in rows), ".3f"),
                ]
            )
        )
    return lines


def mass_ratio(row: Row) -> float:
    """Mass held to the mass that the oracle's blocks hold, mean over layers."""
    return _mean(layer.mass / layer.oracle_mass for layer in row.layers)


def _layer_table(results: Results) -> list[str]:
    lines = ["| budget | layer | mass | mass, oracle's | blocks | error |", "|---|---|---|---|---|---|"]
    for share in results.shares:
        rows = results.of(CALIBRATED, share)
        for layer, of_seeds in enumerate(zip(*(row.layers for row in rows), strict=True)):
            told: list[tuple[str, str]] = [
                ("mass", ".1%"), ("oracle_mass", ".1%"), ("block_recall", ".0%"), ("output_error", ".3f")
            ]  # fmt: skip
            cells = [_spread((getattr(one, name) for one in of_seeds), form) for name, form in told]
            lines.append(_line([f"1/{share}", layer, *cells]))
    return lines


def _spread(values: Iterable[float], form: str) -> str:
    known = list(values)
    mean = format(_mean(known), form)
    return mean if len(known) == 1 else f"{mean} [{min(known):{form}}, {max(known):{form}}]"


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _yes(passed: Sequence[bool]) -> str:
    return "yes" if all(passed) else f"no (in {sum(passed)} of {len(passed)} seeds)"


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
