"""Memory of the ops grows with the length, not with its square: what the process holds at its peak."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from msa_compile.bench.memory import peak_above
from msa_compile.kernels import block_sparse_attention, select_blocks

MIB = 1 << 20


def peaks_of_training_step(length: int) -> list[int]:
    """Return the peak bytes of selection, attention and backward, what they return included."""
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 8, generator=rng).requires_grad_() for heads in (2, 1, 1))
    ids, of_selection = peak(lambda: select_blocks(query[:, :1], key, block_size=64, topk=4))
    output, of_attention = peak(lambda: block_sparse_attention(query, key, value, ids, block_size=64))
    loss = output.sum()
    _, of_backward = peak(loss.backward)
    return [of_selection, of_attention, of_backward]


def peak(call: Callable[[], Any]) -> tuple[Any, int]:
    result, found = peak_above(call, torch.device("cpu"))
    if found is None:
        pytest.skip("this system does not tell the peak of a process")
    return result, found


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    peaks_of_training_step(512)  # compiles, and loads what is loaded once
    short, long = peaks_of_training_step(16384), peaks_of_training_step(65536)
    for name, at_16k, at_64k in zip(("selection", "attention", "backward"), short, long, strict=True):
        print(f"{name}: {at_16k / MIB:.1f} MiB at 16K, {at_64k / MIB:.1f} MiB at 64K")
        # Four times the tokens, and pages that come and go.
        assert at_64k <= 4.5 * at_16k + 8 * MIB
        # A bit for each pair of tokens would be this much.
        assert at_64k < 65536**2 / 8 / 4


def test_workspace_of_a_short_call_is_no_more_than_it_needs() -> None:
    peaks_of_training_step(64)
    assert max(peaks_of_training_step(64)) < 2 * MIB


def test_the_measure_sees_quadratic_memory() -> None:
    rows = torch.randn(4096, 8)
    assert peak(lambda: (rows @ rows.T).softmax(-1))[1] > 1.8 * 4 * 4096**2
