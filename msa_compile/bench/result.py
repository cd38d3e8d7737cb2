"""What is asked of a measurement of a model, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from msa_compile.bench.amdahl import Shares
from msa_compile.bench.spread import Spread

DENSE, SPARSE = "dense", "sparse"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        model: As ``build_subject`` takes it.
        lengths: Of prompts, in tokens.
        layers: To keep; default all, or what fits.
        dtype, device: Of weights and caches.
        inner: Compiler of both models: ``"inductor"``, ``"aot_eager"`` or ``"eager"`` (nothing is compiled then).
        block_size, topk, dense_below: Of ``MSAConfig``.
        indexer: Of ``MSAConfig``. Branches of ``"learned"`` stay as they begin: their time is that of trained ones.
        new_tokens: Steps of decode that are timed.
        seconds: Time to fill with rounds of prefill at one length.
        has_compile_times: Whether compilation is timed, in processes of its own.
    """

    model: str
    lengths: tuple[int, ...]
    layers: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU
    inner: str = "inductor"
    block_size: int = 128
    topk: int = 16
    dense_below: int | Literal["auto"] = "auto"
    indexer: Literal["keys", "learned"] = "keys"
    new_tokens: int = 16
    seconds: float = 20.0
    has_compile_times: bool = True


@dataclass(frozen=True)
class LengthResult:
    """One prompt length; times in seconds, by ``"dense"`` and ``"sparse"``.

    Attributes:
        length: Tokens of the prompt.
        first_token: Time to first token: the prefill.
        first_token_ratio: Dense over sparse, above 1 where sparse is faster.
        step: Time of one new token; its inverse is tokens per second.
        step_ratio: Dense over sparse.
        peak_bytes: Of a prefill, above the weights, cache included; ``None`` where it cannot be told.
        shares: What part of the dense time is attention.
    """

    length: int
    first_token: Mapping[str, Spread]
    first_token_ratio: Spread
    step: Mapping[str, Spread]
    step_ratio: Spread
    peak_bytes: Mapping[str, int | None]
    shares: Shares


@dataclass(frozen=True)
class Compiling:
    """Seconds of the first prefill and steps above later ones, in a process of its own.

    Attributes:
        cold: With an empty cache.
        warm: In another process, with the cache on disk that the first one filled.
    """

    cold: float
    warm: float


@dataclass(frozen=True)
class ModelResult:
    """All that was measured of a model.

    Attributes:
        model, layers, all_layers, parameters, notes: What it was.
        dtype, device, threads, inner, torch: Where and how.
        block_size, topk, dense_below: The budget, and what was said of calls that stay dense.
        indexer: What was asked for.
        learned_sites, missed_selections: Sites with an index branch, and how often one had no index keys, which should
            be 0.
        gate: ``"green ..."``, or what is wrong; there are no lengths then.
        sparse_sites, dense_sites, dense_calls: Of the report; the last should be 0.
        lengths: Shortest first.
        compiling: By ``"dense"`` and ``"sparse"``.
    """

    model: str
    layers: int
    all_layers: int
    parameters: int
    notes: tuple[str, ...]
    dtype: str
    device: str
    threads: int
    inner: str
    torch: str
    block_size: int
    topk: int
    dense_below: tuple[str, ...]
    indexer: str
    learned_sites: int
    missed_selections: int
    gate: str
    sparse_sites: int
    dense_sites: int
    dense_calls: int
    lengths: tuple[LengthResult, ...]
    compiling: Mapping[str, Compiling]

    @property
    def is_green(self) -> bool:
        """Whether there are numbers."""
        return self.gate.startswith("green")
