"""Decide for each attention that was found: sparse, from which length on, or dense with a reason."""

from __future__ import annotations

from collections.abc import Iterable

from msa_compile.config import MSAConfig
from msa_compile.passes.choose_dense_below import choose_dense_below
from msa_compile.passes.detect_attention import Found, Proved
from msa_compile.records import DenseBelow, Reason, Site


def plan_sites(
    found: Iterable[Found], config: MSAConfig, windows: dict[str, int], *, measure: bool
) -> list[tuple[Found, Site]]:
    """One decision for each attention.

    Args:
        found: What detection returned.
        config: What the user asks for.
        windows: Sites that are known, from another graph of the same model, to have a sliding window. A decode step
            over a rolling cache looks causal, and a prompt shorter than the window too; proved windows are added here,
            and such a site is dense in every graph, so that prefill and decode agree.
        measure: Whether a break-even that is not known may be measured.
    """
    return [(entry, _decide(entry, config, windows, measure)) for entry in found]


def _decide(entry: Found, config: MSAConfig, windows: dict[str, int], measure: bool) -> Site:
    reason, detail = entry.reason, entry.detail
    mask = "unproved"
    if entry.proved is not None:
        proof = entry.proved.mask
        mask = str(proof)
        if proof.window is not None:
            windows[entry.name] = proof.window
        if entry.name in windows:
            reason, detail = Reason.SLIDING_WINDOW, f"each query sees the last {windows[entry.name]} keys"
    if not config.matches(entry.name):
        reason, detail = Reason.EXCLUDED, "left out by include/exclude"
    own = None if entry.proved is None else entry.proved.selection
    if own is not None and reason is None:
        chosen = f"own indexer: the model's own {own.topk} blocks of {own.block_size} keys"
        detail = f"{detail}; {chosen}" if detail else chosen
    return Site(
        name=entry.name,
        source=entry.source,
        form=entry.form,
        query_heads=entry.query_heads,
        key_value_heads=entry.key_value_heads,
        head_dim=entry.head_dim,
        mask=mask,
        decision="dense" if reason else "sparse",
        reason=reason,
        detail=detail,
        indexer=None if reason else "keys" if own is None else "own",
        dense_below=None if reason or entry.proved is None else _dense_below(entry.name, entry.proved, config, measure),
        own_budget=None if reason or own is None else (own.block_size, own.topk),
    )


def _dense_below(name: str, proved: Proved, config: MSAConfig, measure: bool) -> DenseBelow:
    if proved.selection is not None:
        return DenseBelow(0, "given", "the model is sparse at every length")
    return choose_dense_below(proved, config.for_site(name), measure=measure)
