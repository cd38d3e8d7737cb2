"""`index_scores="fp8"` on a model: what the op is asked for in a prompt, and in a step with index keys of before."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from msa_compile import MSAConfig
from msa_compile.kernels.select_blocks import cpu, reference
from runtime.tiny import LAYERS, llama, sparse, tokens


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int | None]]]:
    """Queries and candidates of each selection; None for one that is scored exactly."""
    calls: list[tuple[int, int | None]] = []
    again, exact = reference.select_blocks, cpu.select_blocks

    def by_candidates(query: Tensor, key: Tensor, **options: Any) -> Tensor:
        calls.append((query.shape[2], options["candidates"]))
        return again(query, key, **options)

    def exactly(query: Tensor, key: Tensor, **options: Any) -> Tensor:
        calls.append((query.shape[2], None))
        return exact(query, key, **options)

    monkeypatch.setattr(reference, "select_blocks", by_candidates)
    monkeypatch.setattr(cpu, "select_blocks", exactly)
    with torch.no_grad():
        yield calls


def test_a_prompt_is_scored_by_fp8_and_a_step_exactly(called: list[tuple[int, int | None]]) -> None:
    model = sparse(
        llama(), MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned", index_scores="fp8")
    )
    model.generate(tokens(37), max_new_tokens=2, do_sample=False)
    assert called == [(37, 6)] * LAYERS + [(1, None)] * LAYERS
