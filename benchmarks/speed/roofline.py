"""What this machine can do at best, measured in the same process: matrix products a second, bytes a second."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.speed.baselines import onednn_float32
from benchmarks.speed.setting import Work
from msa_compile.bench.spread import take_rounds


@dataclass(frozen=True)
class Roofline:
    """The two ceilings.

    Attributes:
        flops_per_second: Of a square matrix product in the dtype; the best of the ways that torch has.
        bytes_per_second: Read plus written, of a copy.
    """

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, work: Work) -> float:
        """The least time that ``work`` can take under both ceilings."""
        return max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)


def measure_roofline(dtype: torch.dtype, device: torch.device, *, size: int = 2048, megabytes: int = 256) -> Roofline:
    """Time matrix products of ``size`` and a copy of ``megabytes``; the median of a few runs each."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).fill_(1)  # touched, so that no page is first made in the measurement

    def product() -> None:
        torch.mm(a, b, out=out)

    def product_onednn() -> None:
        with onednn_float32():
            torch.mm(a, b, out=out)

    calls = {"copy": lambda: target.copy_(source), "product": product}
    if device.type == "cpu" and dtype == torch.float32:
        calls["onednn"] = product_onednn
    for call in calls.values():
        call()
    rounds = take_rounds(calls, device, seconds=2.0, least=5)
    fastest = min(rounds.of(name).median for name in calls if name != "copy")
    return Roofline(2.0 * size**3 / fastest, 2.0 * source.numel() / rounds.of("copy").median)
