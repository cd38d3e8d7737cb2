"""Masks as models write them: each as a function of the tokens, with the inputs it takes what must be said."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_compile.records import Reason

_TRIL = torch.ones(256, 256).tril()
_TRIU_ADDITIVE = torch.full((256, 256), -math.inf).triu(1)
_MINIMUM = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Mask:
    """One mask.

    Attributes:
        make: From tokens `[B, T, C]` and the extra inputs to the mask that attention takes.
        said: Legal outcomes: names of proved forms, and reasons of refusal.
        extra: Makes the extra inputs for `(B, T)`.
    """

    make: Callable[..., Tensor]
    said: tuple[Any, ...]
    extra: Callable[[int, int], tuple[Tensor, ...]] = lambda batch, length: ()


def behind(x: Tensor) -> Tensor:
    """`[T, T]`: how far key `j` is behind query `i`."""
    slots = torch.arange(x.shape[1], device=x.device)
    return slots[:, None] - slots[None, :]


def causal(x: Tensor) -> Tensor:
    return behind(x) >= 0


def additive(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, -math.inf)


def ragged(batch: int, length: int) -> tuple[Tensor]:
    """Left, right and no padding, and holes; the first slot and so every causal row of row 0 and 3 is real."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        if row % 4 == 1:
            mask[row, : length // 3] = 0
        if row % 4 == 2:
            mask[row, length - length // 4 :] = 0
        if row % 4 == 3:
            mask[row, 2::3] = 0
    return (mask,)


def ragged_bool(batch: int, length: int) -> tuple[Tensor]:
    return (ragged(batch, length)[0].bool(),)


def packed_positions(batch: int, length: int) -> tuple[Tensor]:
    """Three documents, each counted from 0; other cuts in each row."""
    rows = []
    for row in range(batch):
        first = 1 + (3 * row + length // 3) % (length - 2)
        second = first + (length - first) // 2
        rows.append([*range(first), *range(second - first), *range(length - second)])
    return (torch.tensor(rows),)


def handed_in(rows: int | None, heads: int | None, *, floating: bool = False) -> Callable[[int, int], tuple[Tensor]]:
    def make(batch: int, length: int) -> tuple[Tensor]:
        sizes = [size for size in (batch if rows is None else rows, heads) if size]
        seen = (torch.rand(*sizes, length, length, generator=torch.Generator().manual_seed(3)) > 0.3).tril()
        seen = seen | torch.eye(length, dtype=torch.bool)
        return (additive(seen) if floating else seen,)

    return make


def _same_document(x: Tensor, positions: Tensor) -> Tensor:
    document = (positions - torch.arange(x.shape[1], device=x.device)).neg()
    return causal(x) & (document[:, None, :, None] == document[:, None, None, :])


WINDOW, GIVEN = "window", "given"

PLAIN = {
    "causal from arange": Mask(causal, ("causal",)),
    "tril made in the graph": Mask(lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), ("causal",)),
    "triu of minus infinity": Mask(lambda x: torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1), ("causal",)),
    "minimum of the dtype": Mask(lambda x: torch.where(causal(x), 0.0, _MINIMUM), ("causal",)),
    "tril buffer": Mask(lambda x: _TRIL[None, None, : x.shape[1], : x.shape[1]] != 0, ("causal", GIVEN)),
    "tril bool buffer of two dimensions": Mask(lambda x: _TRIL.bool()[: x.shape[1], : x.shape[1]], ("causal", GIVEN)),
    "additive buffer": Mask(
        lambda x: _TRIU_ADDITIVE[: x.shape[1], : x.shape[1]], ("causal", GIVEN, Reason.ATTENTION_BIAS)
    ),
}

PADDED = {
    "bool padding": Mask(lambda x, p: causal(x) & p[:, None, None, :], ("causal+padding",), ragged_bool),
    "int padding != 0": Mask(lambda x, p: causal(x) & (p != 0)[:, None, None, :], ("causal+padding",), ragged),
    "int padding .to(bool)": Mask(
        lambda x, p: causal(x) & p.to(torch.bool)[:, None, None, :], ("causal+padding",), ragged
    ),
    "int padding > 0": Mask(lambda x, p: causal(x) & (p > 0)[:, None, None, :], ("causal+padding", GIVEN), ragged),
    "padding turned additive": Mask(
        lambda x, p: (1.0 - (causal(x) & p.bool()[:, None, None, :]).float()) * _MINIMUM,
        ("causal+padding", GIVEN),
        ragged,
    ),
    "sum of two additive masks": Mask(
        lambda x, p: torch.where(causal(x), 0.0, _MINIMUM) + (1.0 - p[:, None, None, :].float()) * _MINIMUM,
        ("causal+padding", GIVEN),
        ragged,
    ),
    "padded queries see nothing": Mask(
        lambda x, p: causal(x) & p.bool()[:, None, None, :] & p.bool()[:, None, :, None], (GIVEN,), ragged
    ),
}

WINDOWS = {
    **{f"window of {w}": Mask(lambda x, w=w: causal(x) & (behind(x) < w), (WINDOW,)) for w in (1, 2, 3, 8, 33, 100)},
    "window of 5000": Mask(lambda x: causal(x) & (behind(x) < 5000), (WINDOW, GIVEN)),
    "window of 1000000": Mask(lambda x: causal(x) & (behind(x) < 1_000_000), (WINDOW, GIVEN)),
    "window by triu": Mask(
        lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(-99), (WINDOW, GIVEN)
    ),
    "window of a float width": Mask(lambda x: causal(x) & (behind(x) < 100.5), (WINDOW, GIVEN)),
    "window by a factor": Mask(lambda x: causal(x) & (behind(x) * 0.01 < 1), (WINDOW, GIVEN)),
    "window by a square": Mask(lambda x: causal(x) & (behind(x) ** 2 < 10000), (WINDOW, GIVEN)),
    "window by a logarithm": Mask(
        lambda x: causal(x) & (torch.log2(1.0 + behind(x).clamp(min=0)) < 6.5), (WINDOW, GIVEN)
    ),
    "window as a sum of constants": Mask(
        lambda x: causal(x) & (torch.arange(x.shape[1])[:, None] - 30 - (torch.arange(x.shape[1]) + 30) < 40),
        (WINDOW, GIVEN),
    ),
    "window in a tensor": Mask(lambda x: causal(x) & (behind(x) < torch.full((), 100.0)), (WINDOW, GIVEN)),
    "window that grows with the length": Mask(lambda x: causal(x) & (behind(x) < 40 + x.shape[1] // 2), (GIVEN,)),
}


def _of_blocks(x: Tensor, size: int) -> Tensor:
    block = torch.arange(x.shape[1]) // size
    return block[:, None] - block[None, :]


OTHER = {
    "chunks of 8": Mask(lambda x: causal(x) & (_of_blocks(x, 8) == 0), (GIVEN,)),
    "chunks of 128 by a shift": Mask(
        lambda x: causal(x) & (torch.arange(x.shape[1])[:, None] >> 7 == torch.arange(x.shape[1]) >> 7), (GIVEN,)
    ),
    "eight blocks of 16": Mask(lambda x: causal(x) & (_of_blocks(x, 16) < 8), (GIVEN,)),
    "every third key": Mask(lambda x: causal(x) & (behind(x) % 3 == 0), (GIVEN,)),
    "packed by position_ids": Mask(_same_document, (GIVEN,), packed_positions),
    "restarting position_ids compared": Mask(
        lambda x, p: (p[:, None, :, None] >= p[:, None, None, :]) & causal(x), (GIVEN,), packed_positions
    ),
    "prefix of five": Mask(lambda x: causal(x) | (torch.arange(x.shape[1]) < 5)[None, :], (GIVEN,)),
    "prefix handed in": Mask(
        lambda x, p: causal(x) | (torch.arange(x.shape[1]) < p[:, None, None, None]),
        (GIVEN, Reason.NOT_CAUSAL),
        lambda batch, length: (torch.arange(2, batch + 2),),
    ),
    "bool handed in": Mask(lambda x, m: m, (GIVEN,), handed_in(None, 1)),
    "bool of one row handed in": Mask(lambda x, m: m, (GIVEN,), handed_in(1, 1)),
    "bool of three dimensions handed in": Mask(lambda x, m: m[:, None], (GIVEN,), handed_in(None, None)),
    "bool of two dimensions handed in": Mask(lambda x, m: m, (GIVEN,), handed_in(0, None)),
    "bool and causal": Mask(lambda x, m: m & causal(x), (GIVEN,), handed_in(0, None)),
    "float handed in": Mask(lambda x, m: m, (GIVEN,), handed_in(None, 1, floating=True)),
    "padding for all queries": Mask(lambda x, p: p[:, None, None, :], (Reason.NOT_CAUSAL,), ragged_bool),
    "bidirectional": Mask(lambda x: behind(x) < 99999, (Reason.NOT_CAUSAL,)),
    "bidirectional with padding": Mask(
        lambda x, p: p[:, None, None, :].expand(x.shape[0], 1, x.shape[1], x.shape[1]),
        (Reason.NOT_CAUSAL,),
        ragged_bool,
    ),
    "one later key": Mask(lambda x: behind(x) >= -1, (Reason.NOT_CAUSAL,)),
    "alibi": Mask(
        lambda x: additive(causal(x)) - behind(x).float() * (0.5 ** torch.arange(1, 5))[:, None, None],
        (Reason.ATTENTION_BIAS,),
    ),
    "alibi of one slope": Mask(lambda x: additive(causal(x)) - behind(x) * 0.5, (Reason.ATTENTION_BIAS,)),
    "bias far away only": Mask(lambda x: additive(causal(x)) - (behind(x) > 100) * 3.0, (Reason.ATTENTION_BIAS,)),
    "bias behind a shift": Mask(
        lambda x: additive(causal(x)) - (behind(x) >> 6).clamp(min=0) * 1.0, (Reason.ATTENTION_BIAS,)
    ),
    "windows that differ between heads": Mask(
        lambda x: causal(x) & (behind(x) < torch.arange(3, 7)[:, None, None]), (Reason.MASK_PER_HEAD,)
    ),
    "mask of every head handed in": Mask(lambda x, m: m, (Reason.MASK_PER_HEAD,), handed_in(None, 4)),
    "mask from activations": Mask(
        lambda x: causal(x) & ((x @ torch.ones(16) > 3)[:, None, None, :] | torch.eye(x.shape[1]).bool()),
        (Reason.DATA_DEPENDENT_MASK,),
    ),
    "bias from activations": Mask(
        lambda x: additive(causal(x)) + x.mean(-1)[:, None, None, :],
        (Reason.DATA_DEPENDENT_MASK, Reason.ATTENTION_BIAS),
    ),
}

ALL = {**PLAIN, **PADDED, **WINDOWS, **OTHER}
# Below their constants these are plain causal masks, and a graph of one short length may say so.
CAUSAL_WHEN_SHORT = {
    *WINDOWS, "chunks of 128 by a shift", "eight blocks of 16", "bias far away only", "bias behind a shift"
}  # fmt: skip
