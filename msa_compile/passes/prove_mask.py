"""Prove what a mask is by running it, at sizes that straddle its own constants and on random paddings.

A mask is lifted out of the graph with everything that makes it. When it is closed (only sizes, a padding mask, a cache
offset), it is run and compared with causal, causal with padding, and sliding window. What is not one of these but is
certainly visibility (true/false) is passed to the op as it is, which is exact. What may be more than visibility (a
bias) or comes from activations is refused.
"""

from __future__ import annotations

import torch

from msa_compile.passes.attention import Attention, Heads, MaskProof, MaskTerm, Refused
from msa_compile.passes.choose_sizes import SizeSpace
from msa_compile.passes.graph_facts import GraphFacts
from msa_compile.passes.lift_mask import LiftedMask, check_term, constants_of, lift_mask, unproved_step
from msa_compile.passes.replay import ReplayError, concrete, expression, symbols_of
from msa_compile.passes.run_mask import MaskRun, run_mask
from msa_compile.records import Reason

_SIZES = (2, 3, 5, 8, 17, 33)
_LARGEST_CONSTANT = 4500  # a window wider than this is not straddled by a proof; its mask is passed as it is
_LARGEST_RUN = 2**26  # elements of one concrete mask


def prove_mask(facts: GraphFacts, attention: Attention, query: Heads, key: Heads) -> MaskProof:
    """Say what hides the scores of ``attention``.

    Args:
        facts: Facts of the graph.
        attention: The attention.
        query: Its queries.
        key: Its un-repeated keys.

    Raises:
        Refused: If later keys than a prefix of the row are visible, the mask is a bias, comes from activations, or
            differs between heads.
    """
    query_length, key_length = query.length, key.length
    if not attention.mask:
        return _without_mask(attention, query_length, key_length)
    lifted = lift_mask(facts, attention, query, key)
    for term in attention.mask:
        check_term(term, lifted)
    if expression(query_length) != 1 and all(_has_one_row(term) for term in attention.mask):
        raise Refused(Reason.NOT_CAUSAL, "one mask row for all queries")
    if lifted.others:
        detail = "mask handed in or made from positions; applied as it is"
        return MaskProof("given", detail=detail, is_handed_in=True)
    try:
        return _classify(facts, attention, lifted, query, key)
    except ReplayError as error:
        if any(term.kind == "additive" for term in attention.mask):
            raise Refused(Reason.ATTENTION_BIAS, f"an added term could not be run to see its values: {error}") from None
        return MaskProof("given", detail="mask applied as it is")


def _has_one_row(term: MaskTerm) -> bool:
    value = term.node.meta["val"]
    return value.dim() < 2 or expression(value.shape[-2]) == 1


def _without_mask(attention: Attention, query_length: object, key_length: object) -> MaskProof:
    same = expression(query_length) == expression(key_length)
    if attention.is_causal:
        return MaskProof("causal" if same else "top_left", detail="is_causal")
    if expression(query_length) == 1:
        return MaskProof("causal", detail="one query, every key visible")
    raise Refused(Reason.NOT_CAUSAL, "no mask: every query sees every key")


def _classify(facts: GraphFacts, attention: Attention, lifted: LiftedMask, query: Heads, key: Heads) -> MaskProof:
    query_length, key_length = query.length, key.length
    constants = constants_of(lifted)
    lengths_of = expression(query_length).free_symbols | expression(key_length).free_symbols
    symbols = symbols_of(lifted.inner | set(lifted.paddings)) | expression(query.batch).free_symbols | lengths_of
    every = [query_length, key_length, *(node.meta["val"] for node in lifted.inner if "val" in node.meta)]
    space = SizeSpace(size for size in every if isinstance(size, torch.SymInt))
    batches = [query.batch, *(node.meta["val"].shape[0] for node in lifted.paddings)]
    batch_symbols = set().union(*(expression(size).free_symbols for size in batches)) - lengths_of
    straddle = [
        value + extra
        for value in constants
        if value <= _LARGEST_CONSTANT
        for extra in ((1, 3) if value < 512 else (1,))
    ]
    straddle += [bound + extra for bound in space.lower_bounds(symbols - batch_symbols) for extra in (0, 1, 4)]
    runs: list[MaskRun] = []
    budget = _LARGEST_RUN * 4
    failure = ReplayError("no sizes to run at")
    # In a decode step the mask is one longer than the cache was: neighbours of each size too.
    pool = sorted({size - less for size in (*_SIZES, *straddle) for less in (0, 1) if size - less > 1})
    for lengths in space.spread(symbols - batch_symbols, pool, limit=40):
        sizes = {**dict.fromkeys(batch_symbols, 3), **lengths}
        tq, tk = concrete(query_length, sizes), concrete(key_length, sizes)
        cost = tq * tk * 3
        if not space.holds(sizes) or tq > tk or cost > _LARGEST_RUN or cost > budget:
            continue
        budget -= cost
        try:
            runs.extend(run_mask(facts, attention, lifted, sizes, tq, tk))
        except ReplayError as error:
            failure = error  # no call of the model has these sizes: a mask shorter than the keys, say
    if not runs:
        raise failure
    bound = key_length if isinstance(key_length, int) else space.upper_bound(key_length)
    return _compare(runs, lifted, constants, bound, attention.mask)


def _compare(
    runs: list[MaskRun], lifted: LiftedMask, constants: list[int], bound: int | None, terms: tuple[MaskTerm, ...]
) -> MaskProof:
    """What all runs agree on; ``bound`` is the longest ``Tk`` that the graph's own guards allow."""
    plain = [run for run in runs if not run.padded]
    sees_later = any((run.visible & ~run.causal()).any() for run in plain) and not lifted.offsets
    if sees_later and not _is_prefix(plain):
        raise Refused(Reason.NOT_CAUSAL, "a query sees later keys")
    largest = max(run.visible.shape[-1] for run in runs)
    # A mask may still change at a constant beyond every size that was run, unless the graph never gets there.
    covered = all(constant < largest or (bound is not None and constant >= bound) for constant in constants)
    step = unproved_step(lifted)
    if step is not None and bound is not None and all(run.visible.shape[-1] == bound for run in runs):
        step = None  # the graph has one size, and it was run
    if step is not None and any(term.kind == "additive" for term in terms):
        raise Refused(Reason.ATTENTION_BIAS, f"what is added at sizes that were not run is not proved ({step})")
    if step is not None:
        return MaskProof("given", detail=f"mask applied as it is ({step})")
    window = _window(plain)
    if window is not None:
        return MaskProof("window", window=window, detail=f"each query sees the last {window} keys")
    if not covered:
        detail = f"mask has a constant beyond the sizes it was run at ({constants[-1]})"
        # What is added there is looked at when it is there.
        return MaskProof("given", detail=detail, is_handed_in=any(term.kind == "additive" for term in terms))
    if lifted.offsets:
        return MaskProof("given", detail="mask follows the cache position; applied as it is")
    if all(bool((run.visible == run.causal()).all()) for run in plain):
        if not lifted.paddings:
            return MaskProof("causal", detail="mask proved causal")
        if all(bool((run.visible == (run.causal() & run.visible[:, -1:])).all()) for run in runs):
            return MaskProof("causal+padding", detail="mask proved causal with padded keys")
    return MaskProof("given", detail="mask applied as it is")


def _is_prefix(plain: list[MaskRun]) -> bool:
    """Whether each unpadded run is causal but for first keys that all queries see, and some run has more than these."""
    is_longer = False
    for run in plain:
        early = (run.visible & ~run.causal()).any(0).any(0)
        first = torch.arange(len(early)) <= (int(early.nonzero().max()) if early.any() else -1)
        if not bool((run.visible == (run.causal() | first)).all()):
            return False
        is_longer |= not bool(first.all())
    return is_longer


def _window(plain: list[MaskRun]) -> int | None:
    """The width of the sliding window that all unpadded runs agree on, if they show one."""
    shown = [run for run in plain if bool((run.causal() & ~run.visible).any())]
    if not shown:
        return None
    width = int((shown[0].causal() & shown[0].visible)[0, -1].sum())
    same = all(bool((run.visible == (run.causal() & (run.distance() < width))).all()) for run in plain)
    return width if same else None
