"""Fixtures that several folders share."""

import pytest
import torch


@pytest.fixture
def sparse_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The query shape of every call of the sparse op that really ran sparse, as it happens."""
    from msa_compile.kernels.block_sparse_attention import reference

    calls: list[tuple[int, ...]] = []
    original = reference.block_sparse_attention

    def counted(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(reference, "block_sparse_attention", counted)
    return calls
