"""One thread, the op counter, and one compiled Llama a process for all tests that only look at it."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from runtime.tiny import OpCount, counted_ops, llama, sparse, tokens


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ops() -> Iterator[OpCount]:
    with counted_ops() as count:
        yield count


@pytest.fixture(scope="session")
def sparse_llama() -> nn.Module:
    model = sparse(llama())
    with torch.no_grad():
        model(tokens())
    return model
