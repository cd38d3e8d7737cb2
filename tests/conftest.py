"""Fixtures that several folders share."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No decision of a test depends on a clock: every break-even is the budget, kept in a folder of the test's own."""
    from msa_compile.kernels import break_even
    from msa_compile.kernels.cache_dir import CACHE_VARIABLE

    # Made when something is written there, which few tests do.
    folder = tmp_path_factory.getbasetemp() / "break_even" / uuid.uuid4().hex
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    measured = "a number that the tests set"
    monkeypatch.setattr(break_even, "measure", lambda shape: break_even.BreakEven(shape.budget, "measured", measured))
    break_even.forget()
    yield folder
    break_even.forget()


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
