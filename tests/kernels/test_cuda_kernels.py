"""What runs on CUDA, and that it says so where Triton does not; the kernels themselves are tested interpreted."""

import importlib.util
import warnings
from dataclasses import replace
from typing import Any

import kernel_laws as laws
import pytest
import torch
from kernel_laws import Implementation, make_case
from test_kernel_laws import CASES
from torch._subclasses.fake_tensor import FakeTensorMode

from msa_compile.kernels import block_sparse_attention, select_blocks, triton_support
from msa_compile.kernels.block_sparse_attention import cuda as attention_cuda
from msa_compile.kernels.block_sparse_attention import reference as attention_reference
from msa_compile.kernels.index_loss import cuda as loss_cuda
from msa_compile.kernels.index_loss.align_loss import Support, align_sums
from msa_compile.kernels.select_blocks import cuda as selection_cuda
from msa_compile.kernels.select_blocks import reference as selection_reference

CUDA = torch.device("cuda", 0)


def test_without_triton_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_support.can_run_triton.cache_clear()
    case = make_case(queries=9)
    options = {"block_size": 8, "topk": 2}
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        ids = selection_cuda.select_blocks(case.index_query, case.index_key, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = attention_cuda.block_sparse_attention(case.query, case.key, case.value, ids, block_size=8)
    triton_support.can_run_triton.cache_clear()
    laws.assert_equal(ids, selection_reference.select_blocks(case.index_query, case.index_key, **options))
    expected = attention_reference.block_sparse_attention(case.query, case.key, case.value, ids, block_size=8)
    laws.assert_equal(output, expected)


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((8, 0), None, None),
        ((9, 0), None, None),
        ((7, 5), None, "need compute capability 8.0"),
        ((9, 4), "6", "ROCm"),
    ],
)
def test_devices_that_the_kernels_do_not_run_on_are_named(
    capability: tuple[int, int], hip: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = triton_support.why_no_triton(CUDA)
    assert (found is None) == (reason is None)
    if reason is not None:
        assert found is not None
        assert reason in found


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_products_of_e4m3_start_with_ada(
    capability: tuple[int, int], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = triton_support.why_no_e4m3(CUDA)
    assert (found is not None) == is_refused
    assert found is None or "need compute capability 8.9, and cuda:0 has 8.6" in found


def test_float64_is_computed_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for module, name in (
        (selection_reference, "select_blocks"),
        (attention_reference, "block_sparse_attention"),
        (attention_reference, "block_sparse_attention_backward"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _run=original, **k: calls.append(a) or _run(*a, **k))
    case = make_case(queries=9, dtype=torch.float64)
    ids = selection_cuda.select_blocks(case.index_query, case.index_key, block_size=8, topk=2)
    operands = (case.query, case.key, case.value, ids)
    output = attention_cuda.block_sparse_attention(*operands, block_size=8)
    attention_cuda.block_sparse_attention_backward(output, *operands, block_size=8)
    assert len(calls) == 3


def test_the_index_loss_has_kernels_on_cuda_but_not_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(loss_cuda, "can_run_triton", lambda device: asked.append(device) or True)
    with FakeTensorMode():
        half, double = (torch.empty(1, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float64))
    assert loss_cuda.has_kernels(half, half)
    assert not loss_cuda.has_kernels(half, double)
    assert not loss_cuda.has_kernels(torch.empty(1))
    assert asked == [CUDA]


def test_ops_have_kernels_for_cuda_and_shapes_without_one() -> None:
    for name in ("select_blocks", "block_sparse_attention", "block_sparse_attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"msa::{name}", "CUDA")
    with FakeTensorMode():
        query = torch.empty(2, 8, 100, 64, dtype=torch.bfloat16, device="cuda")
        index_query = torch.empty(2, 2, 100, 64, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(2, 2, 300, 64, dtype=torch.bfloat16, device="cuda")
        ids = select_blocks(index_query, key, block_size=32, topk=4)
        output = block_sparse_attention(query, key, key, ids, block_size=32)
        # The op itself: torch's autograd ends the process where tensors say cuda and there is none.
        grads = torch.ops.msa.block_sparse_attention_backward(output, query, key, key, ids, 32)
    for grad, leaf in zip(grads[:3], (query, key, key), strict=True):
        assert (grad.shape, grad.dtype, grad.device.type) == (leaf.shape, torch.bfloat16, "cuda")
    assert (ids.shape, ids.dtype, ids.device.type) == ((2, 2, 100, 4), torch.int32, "cuda")
    assert (output.shape, output.dtype, output.is_contiguous()) == (query.shape, query.dtype, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ids_and_output_equal_the_float64_oracle_on_a_gpu(case: laws.Case) -> None:
    def there(value: Any) -> Any:
        return value.cuda() if isinstance(value, torch.Tensor) else value

    def select(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return select_blocks(*map(there, tensors), **{name: there(value) for name, value in options.items()}).cpu()

    def attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        moved = {name: there(value) for name, value in options.items()}
        return block_sparse_attention(*map(there, tensors), **moved).cpu()

    # Three products of tf32 are a little less exact than one of float32.
    laws.check_equals_oracle(Implementation(select, attend), case, tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("is_selected", [False, True])
@pytest.mark.parametrize(
    ("left_out", "power"), [({}, 1.0), ({"local_blocks": 1, "sink_blocks": 1}, 2.0), ({"local_blocks": 1}, 1.5)]
)
def test_index_loss_equals_float64_on_a_gpu(is_selected: bool, left_out: dict[str, Any], power: float) -> None:
    case = make_case(queries=300, heads_a_group=4)
    operands = [t.cuda() for t in (case.index_query, case.index_key, case.query, case.key)]
    support = Support(block_size=8, **left_out)
    if is_selected:
        support = replace(support, block_ids=select_blocks(*operands[:2], block_size=8, topk=3, **left_out))
    index_query, index_key, query, key = operands
    found = align_sums(index_query, index_key, query, key, support, power=power)
    doubles = (index_query.double(), index_key.double(), query.double(), key.double())
    exact = align_sums(*doubles, support, power=power)
    for one, other in zip(found, exact, strict=True):
        assert one is not None
        assert other is not None
        assert (one.double() - other).norm() <= 1e-5 * other.double().norm()
