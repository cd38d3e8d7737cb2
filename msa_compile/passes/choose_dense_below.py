"""Choose up to which length the calls of a proved site run dense: the user's number, or the measured break-even."""

from __future__ import annotations

from msa_compile.config import MSAConfig
from msa_compile.kernels import break_even
from msa_compile.passes.detect_attention import Proved
from msa_compile.records import DenseBelow

# The ops run nowhere else.
_MEASURABLE = ("cpu", "cuda")


def choose_dense_below(proved: Proved, config: MSAConfig, *, measure: bool) -> DenseBelow:
    """The dense threshold of one site.

    Args:
        proved: The attention; its device, dtype and heads are what a break-even is kept for.
        config: What the user asks for.
        measure: Whether a break-even that nobody has measured yet is measured now; otherwise the budget stands for it.
    """
    budget = config.resolved_dense_below()
    if config.dense_below != "auto":
        return DenseBelow(budget, "given")
    query = proved.query.node.meta["val"]
    if query.device.type not in _MEASURABLE:
        return DenseBelow(budget, "budget", f"break-even is not measured on {query.device.type}")
    shape = break_even.ShapeClass(
        device=query.device,
        dtype=query.dtype,
        query_heads=proved.query.count,
        key_value_heads=proved.key.count,
        head_dim=proved.query.dim,
        block_size=config.block_size,
        topk=config.topk_blocks,
    )
    found = break_even.break_even(shape) if measure else break_even.known_break_even(shape)
    if found is None:
        return DenseBelow(budget, "budget", "the break-even is measured when the model is compiled")
    # Sparse from the break-even on, but never where all blocks are selected: dense is the same there.
    return DenseBelow(max(budget, found.keys - 1), found.origin, found.detail)
