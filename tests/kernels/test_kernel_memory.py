"""Memory of the ops grows with the length, not with its square: bytes of live tensors, counted inside the ops."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.block_sparse_attention import cpu as attention_cpu
from msa_compile.kernels.select_blocks import cpu as selection_cpu


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages made under the mode and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not torch.is_tensor(tensor):
                continue
            storage = tensor.untyped_storage()
            # A view, or an operation in place, makes no storage.
            if storage._cdata not in old and storage not in self._known:
                self._known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)


def count_inside(function: Callable[..., Any], peaks: list[int]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        with LiveBytes() as live:
            result = function(*args, **kwargs)
        peaks.append(live.peak)
        return result

    return counted


def peaks_of_training_step(length: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the peak bytes of selection, attention and backward, what they return included."""
    peaks: list[int] = []
    with monkeypatch.context() as patch:
        for module, name in (
            (selection_cpu, "select_blocks"),
            (attention_cpu, "block_sparse_attention"),
            (attention_cpu, "block_sparse_attention_backward"),
        ):
            patch.setattr(module, name, count_inside(getattr(module, name), peaks))
        rng = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, heads, length, 8, generator=rng).requires_grad_() for heads in (2, 1, 1))
        ids = select_blocks(query[:, :1], key, block_size=64, topk=4)
        block_sparse_attention(query, key, value, ids, block_size=64).sum().backward()
    assert len(peaks) == 3
    return peaks


def test_doubling_the_length_at_most_doubles_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = peaks_of_training_step(8192, monkeypatch), peaks_of_training_step(16384, monkeypatch)
    for name, at_8k, at_16k in zip(("selection", "attention", "backward"), short, long, strict=True):
        print(f"{name}: {at_8k} bytes at 8K, {at_16k} at 16K, ratio {at_16k / at_8k:.2f}")
        assert at_16k <= 2.2 * at_8k
        # A bool for each pair of tokens would be this much.
        assert at_16k < 16384**2 / 2


def test_workspace_of_a_short_call_is_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(peaks_of_training_step(64, monkeypatch)) < 2**20


def test_the_measure_sees_quadratic_memory() -> None:
    peaks: list[int] = []
    for length in (512, 1024):
        rows = torch.randn(length, 8)
        count_inside(lambda rows: (rows @ rows.T).softmax(-1), peaks)(rows)
    assert peaks == [2 * 4 * 512**2, 2 * 4 * 1024**2]
