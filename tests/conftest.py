"""Fixtures that several folders share."""

import pytest
import torch


@pytest.fixture
def sparse_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The query shape of every call of the sparse op that really ran sparse, as it happens."""
    from msa_compile.kernels.block_sparse_attention import cpu

    calls: list[tuple[int, ...]] = []
    original = cpu.block_sparse_attention

    def counted(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(cpu, "block_sparse_attention", counted)
    return calls
