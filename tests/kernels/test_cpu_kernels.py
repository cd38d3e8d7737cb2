"""The CPU kernels by themselves: every way through every case, threads, poison, and what goes to the reference."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import kernel_laws as laws
import pytest
import torch
from kernel_laws import Case, Implementation, make_case
from test_kernel_laws import CASES
from torch import Tensor

from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.block_sparse_attention import cpu, reference
from msa_compile.kernels.segments import Segment, find_segments
from msa_compile.kernels.select_blocks import cpu as selection_cpu
from msa_compile.kernels.select_blocks import reference as selection_reference

OPS = Implementation(select_blocks, block_sparse_attention)
REFERENCE = Implementation(selection_reference.select_blocks, reference.block_sparse_attention)
NAN, INF = float("nan"), float("inf")

# Each way of computing, forced on calls of any size.
WAYS: dict[str, list[tuple[Any, str, int]]] = {
    "packed": [(cpu, "_FEW_QUERIES", 0), (selection_cpu, "_FEW_QUERIES", 0)],
    "in place": [(cpu, "_FEW_QUERIES", 10**6), (selection_cpu, "_FEW_QUERIES", 10**6)],
    "packed, in small pieces": [
        (cpu, "_FEW_QUERIES", 0),
        (cpu, "_TILE_FLOATS", 500),
        (cpu, "_PACKED_BYTES", 1),
        (selection_cpu, "_FEW_QUERIES", 0),
        (selection_cpu, "_TILE", 20),
    ],
}


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in request.param:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_way_equals_the_float64_oracle(case: Case) -> None:
    laws.check_equals_oracle(OPS, case)


@pytest.mark.parametrize("name", ["plain 63", "documents", "window", "softcap", "sink logits", "ragged left padding"])
def test_gradients_in_small_pieces_equal_the_float64_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, constant, value in WAYS["packed, in small pieces"]:
        monkeypatch.setattr(module, constant, value)
    laws.check_gradients_equal_oracle(OPS, CASES[name])


def long_case(dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """Several blocks a task, several pieces a block, several tasks a group; blocks are cut off at the end."""
    return make_case(
        groups=2, heads_a_group=4, queries=700, width=32, block_size=32, topk=5, dtype=dtype, seed=5, **options
    )


LONG: dict[str, dict[str, Any]] = {
    "plain": {},
    "own index key": {"shared_index_key": False},
    "padding": {"bounds": {"key_start": torch.tensor([0, 123]), "key_end": torch.tensor([700, 651])}},
    "window, softcap, sinks": {
        "attend": {"window": 100, "softcap": 3.0, "sinks": torch.linspace(-2, 4, 8)},
    },
    "documents": {"bounds": {"document_start": (torch.arange(700) // 150 * 150).expand(2, 700)}},
    "queries after a cache": {"keys": 900, "bounds": {"query_start": torch.tensor([150, 90])}},
}


@pytest.mark.parametrize("options", LONG.values(), ids=LONG.keys())
def test_long_calls_equal_the_reference_in_float64(options: dict[str, Any]) -> None:
    case = long_case(**options)
    ids = laws.select(OPS, case)
    laws.assert_equal(ids, laws.select(REFERENCE, case))
    exact = [tensor.double().requires_grad_() for tensor in (case.query, case.key, case.value)]
    leaves = [tensor.detach().float().requires_grad_() for tensor in exact]
    arguments = {"block_size": case.block_size, **case.attend, **case.bounds}
    output = block_sparse_attention(*leaves, ids, **arguments)
    expected = block_sparse_attention(*exact, ids, **arguments)
    laws.assert_close(output, expected)
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves, grad)
    for one, other in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        laws.assert_close(one, other, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_result_and_weights_of_bfloat16(dtype: torch.dtype) -> None:
    case = long_case(dtype)
    ids = laws.select(OPS, case)
    laws.assert_equal(ids, laws.select(REFERENCE, case))
    exact = reference.block_sparse_attention(
        case.query.double(), case.key.double(), case.value.double(), ids, block_size=case.block_size
    )
    unit = torch.finfo(dtype).eps / 2
    of_weights = unit * case.value.abs().max().item() if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(laws.attend(OPS, case, ids).double(), exact, rtol=1.01 * unit, atol=of_weights)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.usefixtures("way")
def test_huge_logits_are_safe(size: float) -> None:
    # One block after the other takes all of the softmax, in a different order for each query.
    case = make_case(queries=63, heads_a_group=4, topk=4, attend={"scale": 1.0})
    case = replace(case, query=case.query * size, key=case.key.sign())
    ids = laws.select(OPS, case)
    exact = replace(case, **{name: getattr(case, name).double() for name in ("query", "key", "value")})
    expected = laws.attend(OPS, exact, ids)
    # A logit of 1e4 in float32 is known to a thousandth.
    laws.assert_close(laws.attend(OPS, case, ids), expected, max(2e-6, size * 5e-7))
    assert expected.isfinite().all()


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("target", ["query", "key", "value", "index_query", "index_key"])
@pytest.mark.usefixtures("way")
def test_poison_that_is_visible_reaches_what_it_reaches_in_the_reference(target: str, poison: float) -> None:
    case = make_case(queries=63, topk=4)
    tensor = getattr(case, target).clone()
    tensor[0, :, 20:22, 1:3] = poison
    tensor[1, 0, 3] = poison
    case = replace(case, **{target: tensor})
    ids = laws.select(OPS, case)
    laws.assert_equal(ids, laws.select(REFERENCE, case))
    torch.testing.assert_close(
        laws.attend(OPS, case, ids), laws.attend(REFERENCE, case, ids), rtol=2e-6, atol=2e-6, equal_nan=True
    )


@pytest.mark.usefixtures("way")
def test_a_block_of_nothing_but_infinitely_low_logits_is_nothing() -> None:
    case = make_case(queries=63, topk=8)
    case = replace(case, query=case.query.abs(), key=case.key.index_fill(2, torch.arange(8, 24), -INF))
    ids = laws.select(OPS, case)
    output = laws.attend(OPS, case, ids)
    assert output.isfinite().all()
    laws.assert_close(output, laws.attend(REFERENCE, case, ids))


def test_gradients_of_a_call_that_is_not_finite_are_those_of_the_reference() -> None:
    case = make_case(queries=63, topk=4)
    case.value[0, 0, 20] = NAN
    ids = laws.select(OPS, case)
    grad = torch.randn_like(case.query)
    arguments = (grad, case.query, case.key, case.value, ids)
    found = torch.ops.msa.block_sparse_attention_backward(*arguments, 8)
    expected = reference.block_sparse_attention_backward(*arguments, block_size=8)
    assert found[0].isnan().any()
    for one, other in zip(found, expected[:3], strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_random_scores_choose_what_the_reference_chooses_and_the_same_every_time() -> None:
    rng = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, 900, 16, generator=rng) for _ in range(2))
    ids = select_blocks(query, key, block_size=16, topk=6)
    expected = selection_reference.select_blocks(query, key, block_size=16, topk=6)
    # Two orders of summation may tell two close scores apart differently; here at most one query in five hundred.
    assert (ids != expected).any(-1).sum() <= 4
    for _ in range(3):
        laws.assert_equal(select_blocks(query, key, block_size=16, topk=6), ids)


def test_masks_and_float64_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def record(module: Any, name: str) -> None:
        original = getattr(module, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)

    record(selection_reference, "select_blocks")
    record(reference, "block_sparse_attention")
    record(reference, "block_sparse_attention_backward")
    expected = ["select_blocks", "block_sparse_attention", "block_sparse_attention_backward"]
    for case in (CASES["mask with holes"], make_case(dtype=torch.float64), CASES["plain 63"]):
        calls.clear()
        ids = laws.select(OPS, case)
        leaves = [tensor.clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
        block_sparse_attention(*leaves, ids, block_size=8, **case.bounds).sum().backward()
        assert calls == (expected if case is not CASES["plain 63"] else [])


def run_everything(case: Case) -> list[Tensor]:
    ids = laws.select(OPS, case)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
    output = block_sparse_attention(*leaves, ids, block_size=case.block_size)
    newest = laws.cut(case, slice(699, 700), slice(0, 700))
    return [ids, output, *torch.autograd.grad(output.sum(), leaves), *laws.both(OPS, newest)]


@pytest.mark.usefixtures("two_threads")
def test_two_callers_on_two_threads_each_get_what_one_gets() -> None:
    case = long_case()
    torch.set_num_threads(1)
    expected = run_everything(case)
    torch.set_num_threads(2)
    results: list[list[Tensor]] = []

    def call() -> None:
        torch.set_num_threads(2)
        for _ in range(3):
            results.append(run_everything(case))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 6
    for result in results:
        for one, other in zip(result, expected, strict=True):
            laws.assert_equal(one, other)


@pytest.mark.usefixtures("two_threads")
def test_the_modes_of_the_caller_hold_on_its_threads() -> None:
    case = long_case()
    with torch.inference_mode():
        inside = replace(case, **{name: getattr(case, name).clone() for name in ("query", "key", "value")})
        ids, output = laws.both(OPS, inside)
        assert output.is_inference()
    laws.assert_equal(output.clone(), laws.attend(OPS, case, ids))
    # Tensors of an inference region, used outside of it.
    laws.assert_equal(laws.attend(OPS, inside, ids), laws.attend(OPS, case, ids))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert laws.attend(OPS, case, ids).dtype == torch.bfloat16
        laws.assert_equal(laws.select(OPS, case), ids)


def settings() -> dict[str, object]:
    of_new_thread: list[int] = []
    thread = threading.Thread(target=lambda: of_new_thread.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), of_new_thread[0]),
        "matmul": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision),
        "onednn": (torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "dtype": torch.get_default_dtype(),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.usefixtures("two_threads")
def test_no_setting_of_the_process_changes() -> None:
    before = settings()
    run_everything(long_case())
    assert settings() == before


@pytest.mark.parametrize("keys", [970, 990, 1023])
def test_a_block_that_the_end_of_the_keys_cuts_off_has_the_score_of_what_is_left(keys: int) -> None:
    # Queries behind the end do not have that block for their own, so it is chosen by its score or not at all.
    query, key = torch.ones(1, 1, 1200, 16), -torch.ones(1, 1, 1200, 16)
    key[:, :, 960:keys] = -2.0
    ids = select_blocks(query, key, block_size=64, topk=4, key_end=torch.tensor([keys]))
    expected = selection_reference.select_blocks(query, key, block_size=64, topk=4, key_end=torch.tensor([keys]))
    laws.assert_equal(ids, expected)
    assert 15 not in ids[0, 0, 1100].tolist()


def test_a_block_may_be_longer_than_anything() -> None:
    case = make_case(queries=63, topk=1)
    for block_size in (2**20, 2**62):
        ids = select_blocks(case.index_query, case.index_key, block_size=block_size, topk=1)
        assert ids.eq(0).all()
        laws.assert_close(
            block_sparse_attention(case.query, case.key, case.value, ids, block_size=block_size),
            reference.block_sparse_attention(case.query, case.key, case.value, ids, block_size=64),
        )


@pytest.mark.parametrize(("heads", "width"), [(0, 8), (2, 0)])
def test_nothing_to_attend_with_is_nothing(heads: int, width: int) -> None:
    query, key = torch.ones(1, heads, 32, width, requires_grad=True), torch.ones(1, 2, 32, width, requires_grad=True)
    ids = torch.zeros(1, 2, 32, 1, dtype=torch.int32)
    output = block_sparse_attention(query, key, key, ids, block_size=8, scale=1.0)
    assert output.shape == query.shape
    output.sum().backward()
    assert key.grad is not None
    assert key.grad.eq(0).all()
    assert select_blocks(query, query, block_size=8, topk=1).shape == (1, heads, 32, 1)


def test_gradients_of_huge_logits_are_those_of_the_winner() -> None:
    case = make_case(queries=63, topk=8)
    query, key, value = (
        tensor.float() * size for tensor, size in ((case.query, 3e3), (case.key, 3e3), (case.value, 1))
    )
    ids = torch.zeros_like(laws.select(OPS, case))
    ids[..., 1:] = -1
    leaves = [query.requires_grad_(), key.requires_grad_(), value.requires_grad_()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    output = block_sparse_attention(*leaves, ids, block_size=64)
    expected = block_sparse_attention(*exact, ids, block_size=64)
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves, grad)[2]
    wanted = torch.autograd.grad(expected, exact, grad.double())[2]
    # One key takes all of the softmax, so its value has the whole gradient.
    laws.assert_close(found, wanted, 1e-4)


def segments(**bounds: Any) -> list[Segment]:
    options = {"query_start": None, "key_start": None, "key_end": None, "document_start": None, **bounds}
    return find_segments(batch=2, query_length=10, key_length=30, **options)


def test_segments_are_runs_of_queries_with_one_anchor_counted_from_it() -> None:
    assert segments() == [Segment(row=0, row_end=2, start=0, end=10, anchor=0, length=30, position=20)]
    assert segments(key_start=torch.tensor([22, 0]), key_end=torch.tensor([30, 25])) == [
        Segment(row=0, row_end=1, start=2, end=10, anchor=22, length=8, position=0),
        Segment(row=1, row_end=2, start=0, end=10, anchor=0, length=25, position=20),
    ]
    documents = torch.tensor([[5] * 4 + [24] * 6] * 2)
    assert segments(document_start=documents) == [
        Segment(row=0, row_end=2, start=0, end=4, anchor=5, length=19, position=15),
        Segment(row=0, row_end=2, start=4, end=10, anchor=24, length=6, position=0),
    ]
    # What sees nothing is in no segment.
    assert segments(query_start=torch.tensor([-4, -20])) == [
        Segment(row=0, row_end=1, start=4, end=10, anchor=0, length=6, position=0)
    ]
    assert segments(key_end=torch.tensor([0, 0])) == []
