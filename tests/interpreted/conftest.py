"""The ops run the Triton kernels here, on CPU tensors, and memory that nobody has written holds NaN."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The laws and the oracle are those of the other implementations.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))


@pytest.fixture(autouse=True)
def kernels_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put what a CUDA device runs in the place of what a CPU runs."""
    from msa_compile.kernels.block_sparse_attention import cpu as attention_cpu
    from msa_compile.kernels.block_sparse_attention import cuda as attention_cuda
    from msa_compile.kernels.select_blocks import cpu as selection_cpu
    from msa_compile.kernels.select_blocks import cuda as selection_cuda

    monkeypatch.setattr(selection_cpu, "select_blocks", selection_cuda.select_blocks)
    for name in ("block_sparse_attention", "block_sparse_attention_backward"):
        monkeypatch.setattr(attention_cpu, name, getattr(attention_cuda, name))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, and the largest integers: memory has to be written before it is read."""
    before = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)
