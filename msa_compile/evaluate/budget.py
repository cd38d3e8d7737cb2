"""Search for the fewest blocks a layer that keep the loss within a bar.

Each layer alone, with each candidate, tells what a budget costs there. Taking keys away is a chain of steps, the one
with the least cost for the keys that it saves first (the lower convex hull of each layer, merged); how far down the
chain the bar allows to go is found by bisection, and every setting on the way is measured with all layers together.
"""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from msa_compile.batches import Batch, check_iterable, logits_of, nothing_counts, quiet, read_batch
from msa_compile.config import MSAConfig
from msa_compile.errors import BudgetNotMetError, EvaluateArgumentError
from msa_compile.evaluate.compare import sum_of_nll
from msa_compile.evaluate.fitted import BudgetFit, FrontierPoint, LayerBudget, frontier_table
from msa_compile.evaluate.run import Pair
from msa_compile.progress import progress_bar
from msa_compile.records import Site

Budgets = Mapping[str, int | None]


@dataclass(frozen=True)
class BudgetTask:
    """A sparsified model whose budgets can be changed from call to call.

    Attributes:
        pair: The model as it is, and dense.
        trying: Makes the block in which budgets can be changed.
        set_budgets: Changes them, by the path of a site's owner; `None` is dense.
        sites: The sparse sites, known after the first call in that block.
    """

    pair: Pair
    trying: Callable[[], AbstractContextManager[Any]]
    set_budgets: Callable[[Budgets], None]
    sites: Callable[[], tuple[Site, ...]]


@dataclass(frozen=True)
class Layer:
    """One owner of sparse sites: its path, and its share of what all layers read when they are dense."""

    name: str
    weight: float


class Search:
    """The settings that were measured, and how to measure another.

    Args:
        layers: In the order of the model.
        ladder: Candidates, ascending.
        measure: NLL increase of a setting, nats a token.
        share: Share of the visible keys that a layer of so many blocks reads.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        ladder: Sequence[int],
        measure: Callable[[Budgets], float],
        share: Callable[[int | None], float],
    ) -> None:
        self.layers = tuple(layers)
        self.ladder = tuple(ladder)
        self.share = share
        self.frontier: list[FrontierPoint] = []
        self.alone: dict[str, tuple[tuple[int, float], ...]] = {}
        self._measure = measure

    def run(self, bar: float) -> FrontierPoint | None:
        """The setting that reads the fewest keys of those that keep the bar; `None` if only dense does."""
        for topk in reversed(self.ladder):
            self.try_all(f"all {topk}", {layer.name: topk for layer in self.layers})
        for layer in self.layers:
            self.alone[layer.name] = self._try_alone(layer, bar)
        chain = self.chain()
        good, bad = 0, len(chain)
        while good + 1 < bad:
            middle = (good + bad) // 2
            if self.try_all("by layer", chain[middle]).nll_increase <= bar:
                good = middle
            else:
                bad = middle
        fitting = [point for point in self.frontier if point.nll_increase <= bar]
        return min(fitting, key=lambda point: (point.keys_read, point.nll_increase), default=None)

    def try_all(self, name: str, budgets: Budgets) -> FrontierPoint:
        """Measure a setting and keep it."""
        read = sum(layer.weight * self.share(budgets[layer.name]) for layer in self.layers)
        order = tuple(budgets[layer.name] for layer in self.layers)
        point = FrontierPoint(name, order, read, self._measure(budgets))
        self.frontier.append(point)
        return point

    def chain(self) -> list[Budgets]:
        """Settings from all dense on, each with one layer's budget smaller than in the one before."""
        steps = sorted(
            (slope, index, topk) for index, layer in enumerate(self.layers) for slope, topk in self._steps(layer)
        )
        settings: list[Budgets] = [{layer.name: None for layer in self.layers}]
        for _, index, topk in steps:
            settings.append({**settings[-1], self.layers[index].name: topk})
        return settings

    def _try_alone(self, layer: Layer, bar: float) -> tuple[tuple[int, float], ...]:
        """What each candidate costs in this layer, the largest first; what is beyond the bar ends it."""
        dense: dict[str, int | None] = {other.name: None for other in self.layers}
        tried: list[tuple[int, float]] = []
        for topk in reversed(self.ladder):
            tried.append((topk, self._measure({**dense, layer.name: topk})))
            if tried[-1][1] > bar:
                break
        return tuple(tried)

    def _steps(self, layer: Layer) -> list[tuple[float, int]]:
        """Budgets on the lower convex hull of one layer, from dense down, each with its cost a key saved before it."""
        # Less than nothing is noise: it shall not pay for what other layers cost.
        rest = [(layer.weight * self.share(topk), max(0.0, cost), topk) for topk, cost in self.alone[layer.name]]
        read, cost = layer.weight, 0.0
        steps: list[tuple[float, int]] = []
        while rest:
            slope, read, cost, topk = min(((c - cost) / (read - r), r, c, topk) for r, c, topk in rest)
            # Slopes of a hull never fall; the maximum keeps rounding from putting a step before its own first one.
            steps.append((max([slope, *(before for before, _ in steps)]), topk))
            rest = [entry for entry in rest if entry[0] < read]
        return steps


def fit(
    task: BudgetTask, batches: Iterable[Any], bar: float, candidates: Sequence[int] | None, *, progress: bool
) -> BudgetFit:
    """Search, and say what was found.

    Raises:
        BudgetNotMetError: Nothing but dense keeps the bar.
        EvaluateArgumentError: The bar or the candidates will not do, or the batches are too short.
        EmptyDataError: There is nothing to measure.
        BatchError, NoLogitsError, NonFiniteError: A batch, or what the model makes of it.
    """
    _check_bar(bar)
    config, model = task.pair.config, task.pair.model
    with quiet(model):
        read = (read_batch(model, given) for given in check_iterable(batches))
        kept = [batch for batch in read if batch.counted]
        if not kept:
            nothing_counts()
        longest = max(batch.ids.shape[1] for batch in kept)
        ladder = check_candidates(candidates, config, longest)
        tokens = sum(batch.counted for batch in kept)
        with task.pair.dense():
            dense_nll = _mean_nll("dense", model, kept, tokens)
        with task.trying():
            before = task.pair.dense_calls()
            model(*kept[0].args, **kept[0].kwargs)
            sites = [site for site in task.sites() if site.own_budget is None]
            kept_own = sorted({site.name for site in task.sites()} - {site.name for site in sites})
            if not sites:
                raise EvaluateArgumentError(f"nothing to fit: {_kept_own(kept_own)}")
            layers = _layers(sites)
            steps = len(layers) * len(ladder)
            # The most there may be: layers that fail early need fewer.
            most = steps + len(ladder) + steps.bit_length()
            with progress_bar("budgets", "setting", total=most, shown=progress) as shown:

                def measure(budgets: Budgets) -> float:
                    task.set_budgets(budgets)
                    increase = _mean_nll("sparse", model, kept, tokens) - dense_nll
                    sparse = sum(topk is not None for topk in budgets.values())
                    shown.set_postfix_str(f"{sparse} of {len(layers)} layers: NLL {increase:+.4f}", refresh=False)
                    shown.update()
                    return increase

                search = Search(layers, ladder, measure, lambda topk: keys_read(topk, config.block_size, longest))
                try:
                    best = search.run(bar)
                except KeyboardInterrupt as stopped:
                    stopped.add_note(f"so far:\n{frontier_table(search.frontier, bar)}")
                    raise
            dense_calls = task.pair.dense_calls() - before
    if best is None:
        raise BudgetNotMetError(
            f"no budget keeps NLL within {bar:+.4f} nats a token, in no layer:\n"
            f"{frontier_table(search.frontier, bar)}\n"
            f"Raise max_nll_increase, or give larger candidates than {list(ladder)}."
        )
    found = [
        LayerBudget(layer.name, topk, search.share(topk), search.alone[layer.name])
        for layer, topk in zip(layers, best.topk_blocks, strict=True)
    ]
    frontier = tuple(sorted(search.frontier, key=lambda point: -point.keys_read))
    budgets = dict(zip((layer.name for layer in layers), best.topk_blocks, strict=True))
    notes = [_kept_own(kept_own)] if kept_own else []
    if dense_calls:
        warning = f"WARNING: {dense_calls} calls of sparse sites ran DENSE meanwhile, so that the budgets are too small"
        notes.append(warning)
    return BudgetFit(
        config=config_for(config, budgets, sites),
        layers=tuple(found),
        frontier=frontier,
        nll_increase=best.nll_increase,
        max_nll_increase=bar,
        dense_nll=dense_nll,
        tokens=tokens,
        longest=longest,
        notes=tuple(notes),
    )


def _kept_own(names: Sequence[str]) -> str:
    shown = f"{', '.join(name or '<root>' for name in names[:3])}{', ...' if len(names) > 3 else ''}"
    return f"{len(names)} sites keep the model's own indexer and budget ({shown})"


def config_for(config: MSAConfig, budgets: Budgets, sites: Iterable[Site]) -> MSAConfig:
    """`config` with a budget for each owner of a sparse site; the commonest one is `topk_blocks`."""
    counts = Counter(topk for topk in budgets.values() if topk is not None)
    common = counts.most_common(1)[0][0]
    names = list(dict.fromkeys(site.name for site in sites))
    own = {name: budgets[name.split(":")[0]] for name in names}
    left_out = [glob.escape(name) for name, topk in own.items() if topk is None]
    pairs = tuple((glob.escape(name), topk) for name, topk in own.items() if topk is not None and topk != common)
    return replace(config, topk_blocks=common, exclude=(*config.exclude, *left_out), budgets=pairs)


def keys_read(topk: int | None, block_size: int, length: int) -> float:
    """Share of the keys that the queries of a causal prompt see, of which `topk` blocks are read; `None` is all."""
    if topk is None:
        return 1.0
    read = sum(place % block_size + 1 + min(topk - 1, place // block_size) * block_size for place in range(length))
    return read / (length * (length + 1) // 2)


def check_candidates(candidates: Sequence[int] | None, config: MSAConfig, longest: int) -> tuple[int, ...]:
    """The budgets to try, ascending.

    Raises:
        EvaluateArgumentError: One is illegal, or none would leave a block out.
    """
    least, blocks = config.local_blocks + config.sink_blocks, -(-longest // config.block_size)
    if candidates is None:
        candidates = [topk for topk in (1 << power for power in range(31)) if least <= topk < blocks]
    numbers = sorted({topk for topk in candidates if isinstance(topk, int) and not isinstance(topk, bool)})
    if len(numbers) != len(set(candidates)) or any(topk < least for topk in numbers):
        raise EvaluateArgumentError(
            f"candidates is {list(candidates)}; needed are whole numbers from {least} (local_blocks + sink_blocks)"
        )
    if not numbers or numbers[0] >= blocks:
        raise EvaluateArgumentError(
            f"the longest batch has {longest} tokens, {blocks} blocks of {config.block_size} keys, and no "
            f"candidate of {list(candidates)} would leave one out; give longer batches, or sparsify with a smaller "
            "block_size"
        )
    return tuple(topk for topk in numbers if topk < blocks)


def _check_bar(bar: float) -> None:
    if not isinstance(bar, (int, float)) or isinstance(bar, bool) or not 0 <= bar < math.inf:
        raise EvaluateArgumentError(f"max_nll_increase is {bar!r}; needed is a number from 0, in nats a token")


def _mean_nll(name: str, model: nn.Module, batches: Sequence[Batch], tokens: int) -> float:
    total = 0.0
    for batch in batches:
        total += sum_of_nll(name, logits_of(model(*batch.args, **batch.kwargs), batch), batch)
    return total / tokens


def _layers(sites: Iterable[Site]) -> tuple[Layer, ...]:
    """The owners of sparse sites, in the order of the model, weighted by the width of their heads."""
    unique = {site.name: site for site in sites}
    widths: Counter[str] = Counter()
    for name, site in unique.items():
        widths[name.split(":")[0]] += site.query_heads * site.head_dim
    total = widths.total()
    return tuple(Layer(name, width / total) for name, width in widths.items())
