"""One thread, and a fresh Dynamo for each test: graphs of one test must not come out of another's cache."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_fresh_dynamo() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


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
