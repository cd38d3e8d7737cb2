"""How much faster a model can become by its attention alone: the share of dense time that is attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from msa_compile.bench.spread import take_rounds
from msa_compile.records import Site


@dataclass(frozen=True)
class Shares:
    """Shares of dense attention, 0 to 1.

    Attributes:
        prefill_flops: Of the FLOPs of a prefill.
        prefill_time: Of the time of a dense prefill: SDPA timed alone, times the number of sites.
        decode_time: Of the time of a dense step.
    """

    prefill_flops: float
    prefill_time: float
    decode_time: float


def ceiling(share: float) -> float:
    """Speed-up if attention took no time at all; Amdahl's law."""
    return 1 / (1 - share) if share < 1 else float("inf")


def other_flops_per_token(prefill: Callable[[int], object]) -> float:
    """FLOPs of a prefill that are no attention, for each token.

    Two short prefills tell: what is not attention grows with the length, attention with its square. The head, which
    sees one token, is left out with the constant part where three lengths tell it apart.

    Args:
        prefill: Runs the dense model on so many tokens.
    """
    counts = [float(_count(prefill, length)) for length in (32, 64, 96)]
    # a + b n + c n^2 at n, 2n, 3n with n = 32: the slope at 0.
    return (-5 * counts[0] + 8 * counts[1] - 3 * counts[2]) / (2 * 32)


def _count(prefill: Callable[[int], object], length: int) -> int:
    with FlopCounterMode(display=False) as counter:
        prefill(length)
    return counter.get_total_flops()


def attention_flops(sites: Iterable[Site], length: int) -> float:
    """FLOPs of dense causal attention at these sites, ``2 Hq D N (N + 1)`` each."""
    return sum(2.0 * site.query_heads * site.head_dim * length * (length + 1) for site in sites)


def attention_seconds(
    sites: Iterable[Site], length: int, dtype: torch.dtype, device: torch.device, *, seconds: float
) -> tuple[float, float]:
    """Seconds that SDPA alone takes at these sites: of a prefill of ``length`` tokens, and of one step after it."""
    counts: dict[tuple[int, int, int], int] = {}
    for site in sites:
        heads = (site.query_heads, site.key_value_heads, site.head_dim)
        counts[heads] = counts.get(heads, 0) + 1
    totals = [0.0, 0.0]
    for (query_heads, groups, dim), count in counts.items():
        query = torch.randn(1, query_heads, length, dim, dtype=dtype, device=device)
        key, value = torch.randn(2, 1, groups, length, dim, dtype=dtype, device=device)
        newest = query[:, :, -1:]
        calls = {
            "prefill": lambda q=query, k=key, v=value: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
            "decode": lambda q=newest, k=key, v=value: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        }
        calls["decode"]()
        for place, (name, call) in enumerate(calls.items()):
            rounds = take_rounds({name: call}, device, seconds=seconds, least=2, most=7)
            totals[place] += count * rounds.of(name).median
    return totals[0], totals[1]
