"""How good an index branch is: what it selects against the blocks that hold the most attention, on given calls."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from msa_compile.kernels.index_loss.align_loss import AlignSums, Support, align_sums, sees_itself
from msa_compile.kernels.visibility import Visibility, find_visibility
from msa_compile.observed import SiteCall

# Attention probabilities of a chunk of queries over all heads, elements.
_WORKSPACE = 1 << 22
_ALWAYS_DENSE = 2**62
# What attention is raised to where selection is to be learned. Only the largest parts decide which blocks are best: of
# their squares a narrow key learns these, and spends no width on how the many small ones lie.
_SELECTION_POWER = 2.0
# A block out of reach of a window decides for a query where it holds this share of its attention.
_DECISIVE = 0.2


@dataclass(frozen=True)
class SiteMetrics:
    """Of one site. Shares are means over the queries that see more blocks than they may select.

    Attributes:
        kl: Mean divergence of the index scores' distribution from attention's, as the stage compares them, nats.
        recall: Share of the oracle's blocks that were selected. The oracle takes the blocks with the most attention.
        mass: Share of a query's attention that lies in the selected blocks.
        oracle_mass: The same of the oracle's blocks: no selection of so many blocks has more.
        keys_mass: The same of what `"keys"` selects, without an index branch.
        output_error: Relative error of the attention's output, `|sparse - dense| / |dense|`.
        queries: How many queries of a group see more blocks than they may select.
        decisive: How many of these give a fifth of their attention or more to one far block: none of the first ones
            that are selected anyway, and none that a window over as many blocks would have. 0 too in what a version
            saved that did not count them.
        found: Share of those that selected it; 1 where there are none. Lost facts are here: they are few, and in a
            mean of masses over all queries nobody sees them.
        keys_found: The same of what `"keys"` selects.
    """

    kl: float
    recall: float
    mass: float
    oracle_mass: float
    keys_mass: float
    output_error: float
    queries: int
    decisive: int = 0
    found: float = 1.0
    keys_found: float = 1.0

    @property
    def found_ratio(self) -> float:
        """What the branch finds of what `"keys"` finds."""
        return self.found / self.keys_found if self.keys_found else 1.0

    @property
    def mass_ratio(self) -> float:
        """What the branch captures of what the oracle does."""
        return self.mass / self.oracle_mass if self.oracle_mass else 0.0


@dataclass
class MetricSums:
    """Sums over queries, which shards can add; scalars float64."""

    kl: Tensor
    counted: Tensor
    recall: Tensor
    mass: Tensor
    oracle_mass: Tensor
    keys_mass: Tensor
    choosing: Tensor
    error: Tensor
    energy: Tensor
    decisive: Tensor
    found: Tensor
    keys_found: Tensor

    @classmethod
    def zeros(cls) -> MetricSums:
        """Of no query."""
        return cls(*torch.zeros(len(fields(cls)), dtype=torch.float64))

    def as_tensor(self) -> Tensor:
        """All of them, `[12]`."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    def means(self) -> SiteMetrics:
        """What they say."""
        choosing, decisive = max(int(self.choosing), 1), int(self.decisive)
        return SiteMetrics(
            kl=float(self.kl / self.counted.clamp(min=1)),
            recall=float(self.recall) / choosing,
            mass=float(self.mass) / choosing,
            oracle_mass=float(self.oracle_mass) / choosing,
            keys_mass=float(self.keys_mass) / choosing,
            output_error=float((self.error / self.energy.clamp(min=1e-30)).sqrt()),
            queries=int(self.choosing),
            decisive=decisive,
            found=float(self.found) / decisive if decisive else 1.0,
            keys_found=float(self.keys_found) / decisive if decisive else 1.0,
        )


def support_of(call: SiteCall, counted: Tensor | None, block_ids: Tensor | None = None) -> Support:
    """What index scores and attention of a call are compared on.

    Args:
        call: The call.
        counted: bool `[B, T]`, False where a token is padding, of this call's tokens or of all in the cache too.
        block_ids: Selected blocks; default all.
    """
    batch, _, length, _ = call.query.shape
    bounds = {name: value for name, value in call.bounds.items() if name != "block_size"}
    own = sees_itself(length, call.key.shape[2], call.query.device, **bounds).expand(batch, -1)
    if counted is not None and counted.shape[0] == batch and counted.shape[1] >= length:
        own = own & counted[:, counted.shape[1] - length :]
    return Support(own, block_ids, call.bounds["block_size"], **bounds)


def compare(
    call: SiteCall, counted: Tensor | None, stage: str, block_ids: Tensor | None = None, *, has_gradients: bool = True
) -> AlignSums:
    """Index scores against attention, as a stage of the calibration compares them.

    Args:
        call: The call.
        counted: As for `support_of`.
        stage: `"select"` compares the squares of attention's probabilities, where a selection has a choice; the others
            attention as it is.
        block_ids: Selected blocks to compare on; default all.
        has_gradients: Whether they are wanted.
    """
    support, power = support_of(call, counted, block_ids), 1.0
    if stage == "select":
        budget, power = call.budget, _SELECTION_POWER
        support = replace(support, local_blocks=budget["local_blocks"], sink_blocks=budget["sink_blocks"])
    return align_sums(
        call.index_query.detach(),
        call.index_key.detach(),
        call.query,
        call.key,
        support,
        scale=call.factors["scale"],
        softcap=call.factors["softcap"],
        power=power,
        has_gradients=has_gradients,
    )


def add_metrics(sums: MetricSums, call: SiteCall, counted: Tensor | None, stage: str) -> None:
    """Add one call of a site; `stage` says what divergence is."""
    select = torch.ops.msa.select_blocks
    index_query, index_key = call.index_query.detach(), call.index_key.detach()
    support = support_of(call, counted)
    aligned = compare(call, counted, stage, has_gradients=False)
    sums.kl += aligned.loss.double().cpu()
    sums.counted += aligned.queries.double().cpu()
    heads = call.query.unflatten(1, (call.key.shape[1], -1))
    chosen = select(index_query, index_key, **call.budget, **call.bounds)
    by_keys = select(heads.mean(2), call.key, **call.budget, **call.bounds)
    _add_shares(sums, call, support, chosen, by_keys)
    attend = torch.ops.msa.block_sparse_attention
    operands = (call.query, call.key, call.value, chosen)
    dense = attend(*operands, **call.bounds, **call.factors, dense_below=_ALWAYS_DENSE).double()
    sparse = attend(*operands, **call.bounds, **call.factors).double()
    change = sparse - dense
    assert support.counted is not None, "it is always said which queries count"
    rows = support.counted[:, None, :, None]
    dense, change = torch.where(rows, dense, 0.0), torch.where(rows, change, 0.0)
    sums.error += change.square().sum().cpu()
    sums.energy += dense.square().sum().cpu()


def _add_shares(sums: MetricSums, call: SiteCall, support: Support, chosen: Tensor, by_keys: Tensor) -> None:
    batch, query_heads, length, _ = call.query.shape
    key_length, size = call.key.shape[2], call.bounds["block_size"]
    bounds = {name: value for name, value in call.bounds.items() if name != "block_size"}
    seen = find_visibility(query_length=length, key_length=key_length, device=call.query.device, **bounds)
    step = max(1, _WORKSPACE // (batch * query_heads * key_length))
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        mass, visible = _masses(call, seen.rows(rows.start, rows.stop), rows, size)
        number = torch.arange(mass.shape[3], device=mass.device)
        own = ((seen.position[:, rows] - seen.anchor[:, rows]) // size)[:, None, :, None]
        is_near = number > own - call.budget["topk"]
        is_forced = (number < call.budget["sink_blocks"]) | (
            (number <= own) & (number > own - call.budget["local_blocks"])
        )
        best = _oracle(call, mass, visible, is_forced)
        mine, keys = (_as_sets(ids[:, :, rows], mass.shape[3]) for ids in (chosen, by_keys))
        assert support.counted is not None, "it is always said which queries count"
        choosing = (visible.sum(3) > call.budget["topk"]) & support.counted[:, None, rows]

        def total(values: Tensor, choosing: Tensor = choosing) -> Tensor:
            return torch.where(choosing, values, 0.0).sum(dtype=torch.float64).cpu()

        sums.recall += total((mine & best).sum(3) / best.sum(3).clamp(min=1))
        for name, blocks in (("mass", mine), ("oracle_mass", best), ("keys_mass", keys)):
            setattr(sums, name, getattr(sums, name) + total((mass * blocks).sum(3)))
        sums.choosing += choosing.sum().double().cpu()
        largest, place = mass.masked_fill(is_forced | is_near, 0.0).max(3)
        is_decisive = choosing & (largest >= _DECISIVE)
        sums.decisive += is_decisive.sum().double().cpu()
        for name, blocks in (("found", mine), ("keys_found", keys)):
            has_it = blocks.gather(3, place[..., None])[..., 0]
            setattr(sums, name, getattr(sums, name) + (is_decisive & has_it).sum().double().cpu())


def _masses(call: SiteCall, seen: Visibility, rows: slice, size: int) -> tuple[Tensor, Tensor]:
    """Attention of each group in each block `[B, Hkv, C, N]`, mean over its heads, and which blocks are visible."""
    groups, key_length = call.key.shape[1:3]
    query = call.query[:, :, rows].unflatten(1, (groups, -1)).float()
    scale = call.query.shape[3] ** -0.5 if call.factors["scale"] is None else call.factors["scale"]
    logits = query @ call.key[:, :, None].float().transpose(3, 4) * scale
    if call.factors["softcap"] is not None:
        logits = call.factors["softcap"] * torch.tanh(logits / call.factors["softcap"])
    visible = seen.of_all_slots()
    logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    share = torch.where(visible, logits.softmax(-1).mean(2), 0.0)
    slots = torch.arange(key_length, device=share.device)
    block = ((slots - seen.anchor[:, None, :, None]).clamp(min=0) // size).expand_as(share)
    empty = share.new_zeros(*share.shape[:3], -(-key_length // size))
    mass = empty.scatter_add(3, block, share)
    return mass, empty.scatter_add(3, block, visible.expand_as(share).to(share.dtype)) > 0


def _oracle(call: SiteCall, mass: Tensor, visible: Tensor, is_forced: Tensor) -> Tensor:
    """The blocks with the most attention, those that are always selected among them: bool `[B, Hkv, C, N]`."""
    worth = torch.where(is_forced, mass + 2.0, mass).masked_fill(~visible, -1.0)
    best = worth.topk(min(call.budget["topk"], mass.shape[3]), 3).indices
    return torch.zeros_like(visible).scatter(3, best, True) & visible


def _as_sets(ids: Tensor, blocks: int) -> Tensor:
    """Block ids `[B, Hkv, C, topk]` as bool `[B, Hkv, C, N]`."""
    found = torch.zeros(*ids.shape[:3], blocks + 1, dtype=torch.bool, device=ids.device)
    # -1, no block, lands in the last column.
    return found.scatter(3, ids.long() % (blocks + 1), True)[..., :blocks]
