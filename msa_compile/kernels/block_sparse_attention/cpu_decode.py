"""Block-sparse attention on a CPU for few queries: every query gathers its own blocks.

Arguments and result as in `op.py`, without a mask. Nothing grows with the number of keys.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from msa_compile.kernels.threads import run_all
from msa_compile.kernels.visibility import Visibility, find_visibility

# Keys gathered at once, in elements.
_WORKSPACE = 1 << 20


def attend_few_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    document_start: Tensor | None,
) -> Tensor:
    """Attend to the visible tokens of the selected blocks."""
    batch, heads, query_length, head_dim = query.shape
    groups, key_length = key.shape[1:3]
    output = query.new_zeros(query.shape)
    if output.numel() == 0 or key_length == 0:
        return output
    visibility = find_visibility(
        query_length=query_length,
        key_length=key_length,
        device=query.device,
        window=window,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
    )
    heads_a_group = heads // groups
    step = max(1, _WORKSPACE // (block_ids.shape[-1] * block_size * head_dim))
    tasks: list[Callable[[], None]] = []
    for start in range(0, query_length, step):
        end = min(start + step, query_length)
        seen = visibility.rows(start, end)
        slots, is_hidden = _find_slots(block_ids[:, :, start:end], block_size, seen)
        for row in range(batch):
            for group in range(groups):
                of_group = slice(group * heads_a_group, (group + 1) * heads_a_group)
                tasks.append(
                    partial(
                        _attend,
                        query[row, of_group, start:end].transpose(0, 1),
                        key[row, group],
                        value[row, group],
                        slots[row, group],
                        is_hidden[row, group],
                        None if sinks is None else sinks[of_group],
                        output[row, of_group, start:end].transpose(0, 1),
                        scale=scale,
                        softcap=softcap,
                    )
                )
    run_all(tasks)
    return output


def _find_slots(block_ids: Tensor, block_size: int, seen: Visibility) -> tuple[Tensor, Tensor]:
    """Return the slots of the selected blocks and which of them are hidden, both `[B, Hkv, C, W]`."""
    ids = block_ids.to(torch.int64)[..., None]
    slots = (seen.anchor[:, None, :, None, None] + ids * block_size + torch.arange(block_size)).flatten(-2)
    of_ids = (ids >= 0).expand(*ids.shape[:-1], block_size).flatten(-2)
    is_visible = seen.of_slots(slots) & of_ids
    return slots.clamp_(0, seen.key_length - 1), ~is_visible


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    is_hidden: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """Attend for the queries of one group.

    Args:
        query: `[C, G, D]`.
        key: `[Tk, D]`.
        value: `[Tk, D]`.
        slots: `[C, W]` int64, inside the keys.
        is_hidden: `[C, W]` bool.
        sinks: `[G]`, or None.
        output: `[C, G, D]`: where the result goes.
        scale: factor of the logits.
        softcap: bound of the logits, or None.
    """
    queries, width = slots.shape
    shape = (queries, width, -1)
    of_slots = slots.flatten()
    key = key.index_select(0, of_slots).to(torch.float32).view(shape)
    # Zeroed: 0 times NaN would carry poisoned memory into the result.
    value = value.index_select(0, of_slots).to(torch.float32).view(shape).masked_fill_(is_hidden[..., None], 0.0)
    logits = (query.to(torch.float32) * scale) @ key.transpose(-1, -2)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits.masked_fill_(is_hidden[:, None], -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(torch.float32)[None, :, None].expand(queries, -1, 1)], -1)
    probabilities = torch.softmax(logits, -1)
    # Nothing but -inf: no token is seen, and softmax says NaN.
    is_empty = logits.amax(-1, keepdim=True) == -torch.inf
    output.copy_(probabilities.masked_fill_(is_empty, 0.0)[..., :width] @ value)
