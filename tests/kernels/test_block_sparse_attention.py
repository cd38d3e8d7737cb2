"""What only `block_sparse_attention` promises: gradients, autocast, poisoned memory, dense path, argument errors."""

from dataclasses import replace
from typing import Any

import kernel_laws as laws
import pytest
import torch
from kernel_laws import Case, Implementation, make_case
from torch import Tensor
from torch.nn import functional as F

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.block_sparse_attention import cpu

OPS = Implementation(select_blocks, block_sparse_attention)
NAN = float("nan")


def small_case(**options: Any) -> Case:
    return make_case(batch=1, groups=2, queries=7, width=2, block_size=2, topk=2, dtype=torch.float64, **options)


VARIANTS = {
    "plain": {},
    "window and softcap": {"window": 5, "softcap": 0.8, "scale": 1.1},
    "documents": {"document_start": torch.tensor([[0, 0, 0, 3, 3, 3, 3]])},
    "ranges and mask": {
        "query_start": torch.tensor([1]),
        "key_start": torch.tensor([1]),
        "key_end": torch.tensor([6]),
        "mask": torch.tensor([True, True, True, False, True, True, True]).view(1, 1, 1, 7),
    },
}


@pytest.mark.parametrize("dense_below", [0, 7], ids=["sparse", "dense"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_gradcheck(options: dict[str, Any], with_sinks: bool, dense_below: int) -> None:
    case = small_case()
    ids = laws.select(OPS, case)
    leaves = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
    if with_sinks:
        leaves.append(torch.randn(4, dtype=torch.float64, requires_grad=True))

    def call(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        return torch.ops.msa.block_sparse_attention(
            query, key, value, ids, 2, sinks=sinks, dense_below=dense_below, **options
        )

    assert torch.autograd.gradcheck(call, leaves)


def sample(requires_grad: bool = True, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    case = make_case(queries=20)
    ids = laws.select(OPS, case)
    tensors = [tensor.requires_grad_(requires_grad) for tensor in (case.query, case.key, case.value)]
    return (*tensors, ids, 8), options


OPCHECKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks, softcap, window": {"sinks": torch.randn(4), "softcap": 2.0, "window": 9, "scale": 0.3},
    "ranges and mask": {
        "query_start": torch.tensor([0, 1]),
        "key_start": torch.tensor([3, 17]),
        "key_end": torch.tensor([20, 19]),
        "mask": torch.ones(1, 2, 1, 20, dtype=torch.bool),
    },
    "documents": {"document_start": torch.arange(20).expand(2, 20) // 7 * 7},
    "dense": {"dense_below": 20},
    "dense with sinks": {"dense_below": 20, "sinks": torch.randn(4)},
}


@pytest.mark.parametrize("options", OPCHECKS.values(), ids=OPCHECKS.keys())
def test_opcheck(options: dict[str, Any]) -> None:
    torch.library.opcheck(torch.ops.msa.block_sparse_attention.default, *sample(**options))


@pytest.mark.parametrize("options", OPCHECKS.values(), ids=OPCHECKS.keys())
def test_opcheck_of_backward(options: dict[str, Any]) -> None:
    arguments, options = sample(requires_grad=False, **options)
    torch.library.opcheck(
        torch.ops.msa.block_sparse_attention_backward.default, (torch.randn(2, 4, 20, 8), *arguments), options
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_accumulates_in_float32(dtype: torch.dtype) -> None:
    case = make_case(queries=63, dtype=dtype)
    ids = laws.select(OPS, case)
    leaves = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    output = block_sparse_attention(*leaves, ids, block_size=8)
    expected = block_sparse_attention(*exact, ids, block_size=8)
    assert output.dtype == dtype
    # Half a unit in the last place: rounded is the result alone, and the weights of bfloat16 values.
    unit = torch.finfo(dtype).eps / 2
    of_weights = unit * case.value.abs().max().item() if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.double(), expected, rtol=1.01 * unit, atol=of_weights)
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves, grad)
    for one, other in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=1.01 * unit, atol=1e-5)


def test_poisoned_memory_never_reaches_output_or_gradients() -> None:
    # Slots that no query may use: padding, a hole in the mask, and blocks that no query of the group selected.
    clean = make_case(
        queries=30, keys=60, bounds={"key_start": torch.tensor([9, 2]), "key_end": torch.tensor([60, 50])}
    )
    clean.bounds["mask"] = (torch.arange(60) % 7 != 3).view(1, 1, 1, 60)
    clean.bounds["query_start"] = torch.tensor([20, 30])
    ids = laws.select(OPS, clean)
    # Query 4 sees nothing and is itself poisoned.
    ids[:, :, 4] = -1
    slot = torch.arange(60)
    used = torch.zeros(2, 2, 60, dtype=torch.bool)
    for row in range(2):
        start, end = clean.bounds["key_start"][row], clean.bounds["key_end"][row]
        reach = (slot >= start) & (slot < end) & (slot <= clean.bounds["query_start"][row] + 29) & (slot % 7 != 3)
        for group in range(2):
            used[row, group] = reach & torch.isin((slot - start) // 8, ids[row, group])
    assert not used.all()
    results = []
    for poison in (0.0, NAN, float("inf")):
        case = replace(
            clean,
            key=clean.key.masked_fill(~used[..., None], poison).requires_grad_(),
            value=clean.value.masked_fill(~used[..., None], poison).requires_grad_(),
            query=clean.query.index_fill(2, torch.tensor([4]), poison).requires_grad_(),
        )
        output = laws.attend(OPS, case, ids)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        results.append((output, *torch.autograd.grad(output, (case.query, case.key, case.value), grad)))
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            laws.assert_equal(one, other)
    for grad in results[0][2:]:
        assert (grad[~used] == 0).all()


def test_ids_beyond_the_last_block_are_ignored() -> None:
    case = make_case()
    ids = laws.select(OPS, case)
    beyond = torch.where(ids == -1, 10**6, ids)
    laws.assert_equal(laws.attend(OPS, case, beyond), laws.attend(OPS, case, ids))


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_empty_inputs_give_zeros(shape: tuple[int, int, int]) -> None:
    batch, queries, keys = shape
    key = torch.ones(batch, 2, keys, 3, requires_grad=True)
    query = torch.ones(batch, 4, queries, 3, requires_grad=True)
    ids = torch.zeros(batch, 2, queries, 2, dtype=torch.int32)
    for dense_below in (0, 10):
        output = torch.ops.msa.block_sparse_attention(query, key, key, ids, 4, dense_below=dense_below)
        laws.assert_equal(output, torch.zeros_like(query))
        output.sum().backward()


def test_strided_inputs_give_contiguous_equal_results() -> None:
    case = make_case()
    ids = laws.select(OPS, case)
    strided = {
        name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name in ("query", "key", "value")
    }
    assert not strided["query"].is_contiguous()
    output = laws.attend(OPS, replace(case, **strided), ids.transpose(1, 2).contiguous().transpose(1, 2))
    assert output.is_contiguous()
    laws.assert_equal(output, laws.attend(OPS, case, ids))
    # The gradient of a sum is an expanded scalar: no stride at all.
    output.sum().backward()


def test_autocast_casts_query_key_and_value_to_the_dtype_of_the_region() -> None:
    case = make_case()
    ids = laws.select(OPS, case)
    expected = block_sparse_attention(
        case.query.bfloat16(), case.key.bfloat16(), case.value.bfloat16(), ids, block_size=8, sinks=torch.ones(4)
    )
    leaves = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
    sinks = torch.ones(4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block_sparse_attention(leaves[0], leaves[1], leaves[2].bfloat16(), ids, block_size=8, sinks=sinks)
        output.sum().backward()
    assert output.dtype == torch.bfloat16
    laws.assert_equal(output, expected)
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in (*leaves, sinks))
    with torch.autocast("cpu", dtype=torch.float16):
        assert laws.attend(OPS, case, ids).dtype == torch.float16
        assert laws.attend(OPS, make_case(dtype=torch.float64), ids).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert laws.attend(OPS, case, ids).dtype == torch.float32


def test_compile_keeps_the_op_whole_with_gradients_and_autocast() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ids = select_blocks(query[:, ::2], key, block_size=8, topk=3)
            return block_sparse_attention(query, key, value.bfloat16(), ids, block_size=8)

    for length in (63, 100):
        case = make_case(queries=length)
        leaves = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
        output = step(*leaves)
        ids = select_blocks(case.query[:, ::2], case.key, block_size=8, topk=3)
        expected = block_sparse_attention(*(leaf.bfloat16() for leaf in leaves), ids, block_size=8)
        laws.assert_equal(output, expected)
        grad = torch.randn_like(output)
        for one, other in zip(
            torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
        ):
            laws.assert_equal(one, other)


def test_compile_checks_numbers_that_are_symbolic() -> None:
    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def step(case: dict[str, Tensor], scale: float, softcap: float, window: int, block_size: int) -> Tensor:
        return block_sparse_attention(**case, scale=scale, softcap=softcap, window=window, block_size=block_size)

    case = make_case()
    tensors = {"query": case.query, "key": case.key, "value": case.value, "block_ids": laws.select(OPS, case)}
    for numbers in ((0.3, 2.0, 9, 8), (0.4, 3.0, 11, 16)):
        scale, softcap, window, block_size = numbers
        expected = block_sparse_attention(**tensors, scale=scale, softcap=softcap, window=window, block_size=block_size)
        laws.assert_close(step(tensors, *numbers), expected)


HOLES = torch.rand(2, 2, 40, 63, generator=torch.Generator().manual_seed(7)) > 0.4
DENSE: dict[str, dict[str, Any]] = {
    "square": {"queries": 63},
    "newest query": {"queries": 1},
    "chunk": {},
    "window": {"attend": {"window": 9}},
    "softcap": {"attend": {"softcap": 0.9, "scale": 0.7}},
    "scale": {"attend": {"scale": 0.7}},
    "sinks": {"attend": {"sinks": torch.tensor([0.0, 1.0, -1.0, 3.0])}},
    "left padding": {"bounds": {"key_start": torch.tensor([0, 50])}},
    "row without keys": {"bounds": {"key_end": torch.tensor([63, 0])}},
    "unfilled cache": {"bounds": {"query_start": torch.tensor([3, 3])}},
    "documents": {"bounds": {"document_start": torch.arange(23, 63).expand(2, 40) // 9 * 9}},
    "mask a group": {"bounds": {"mask": HOLES}},
    "mask of keys": {"bounds": {"mask": HOLES[:, :1, :1]}},
    "mask of queries with sinks": {
        "bounds": {"mask": HOLES[:, :, :, :1]},
        "attend": {"sinks": torch.tensor([0.0, 1.0, -1.0, 3.0]), "window": 20},
    },
}


@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE.keys())
def test_dense_path_equals_all_blocks_selected(options: dict[str, Any]) -> None:
    case = make_case(**{"queries": 40, "keys": 63, "topk": 8, **options})
    ids = laws.select(OPS, case)
    # What no query sees is poisoned, except where a bound leaves nothing unseen.
    nobody = case.bounds.get("key_end", torch.tensor([63, 63])).view(2, 1, 1, 1) <= torch.arange(63).view(1, 1, 63, 1)
    nobody = nobody | (
        torch.arange(63).view(1, 1, 63, 1) < case.bounds.get("key_start", torch.zeros(2)).view(2, 1, 1, 1)
    )
    if "query_start" in case.bounds:
        nobody = nobody | (torch.arange(63).view(1, 1, 63, 1) >= 43)
    leaves = [
        case.query.requires_grad_(),
        case.key.masked_fill(nobody, NAN).requires_grad_(),
        case.value.masked_fill(nobody, NAN).requires_grad_(),
    ]
    arguments = {"block_size": 8, **case.attend, **case.bounds}
    expected = torch.ops.msa.block_sparse_attention(*leaves, ids, **arguments)
    output = torch.ops.msa.block_sparse_attention(*leaves, torch.full_like(ids, -1), dense_below=63, **arguments)
    assert output.is_contiguous()
    laws.assert_close(output, expected)
    grad = torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        laws.assert_close(one, other, 1e-5)


def test_a_cache_that_grows_past_dense_below_needs_no_new_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_lengths: list[int] = []
    sparse = cpu.block_sparse_attention

    def record(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        sparse_lengths.append(key.shape[2])
        return sparse(query, key, *rest, **options)

    monkeypatch.setattr(cpu, "block_sparse_attention", record)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def decode(query: Tensor, key: Tensor) -> Tensor:
        ids = torch.ops.msa.select_blocks(query, key, 8, 9, dense_below=33)
        return torch.ops.msa.block_sparse_attention(query, key, key, ids, 8, dense_below=33)

    for length in range(31, 37):
        query, key = torch.randn(1, 2, 2, 4), torch.randn(1, 2, length, 4)
        output = decode(query, key)
        visible = torch.arange(length) <= torch.arange(length - 2, length)[:, None]
        laws.assert_close(output, F.scaled_dot_product_attention(query, key, key, attn_mask=visible))
    assert sparse_lengths == [34, 35, 36]
    assert graphs == 1


Q, K, IDS = torch.randn(2, 6, 10, 4), torch.randn(2, 3, 20, 4), torch.zeros(2, 3, 10, 2, dtype=torch.int32)
LEGAL: dict[str, Any] = {"query": Q, "key": K, "value": K, "block_ids": IDS, "block_size": 4}


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("query", {"query": Q[0]}),
        ("query", {"query": Q.long()}),
        ("query", {"query": Q[:, :4]}),
        ("key", {"key": K[0]}),
        ("key", {"key": K.double()}),
        ("key", {"key": K[:1]}),
        ("key", {"key": K[..., :3]}),
        ("key", {"key": K.to("meta")}),
        ("value", {"value": K[:, :1]}),
        ("value", {"value": K[:, :, :19]}),
        ("value", {"value": K.bfloat16()}),
        ("block_ids", {"block_ids": IDS.long()}),
        ("block_ids", {"block_ids": IDS[:, :1]}),
        ("block_ids", {"block_ids": IDS[:, :, :9]}),
        ("block_ids", {"block_ids": IDS[..., :0]}),
        ("block_ids", {"block_ids": IDS[0]}),
        ("block_size", {"block_size": 0}),
        ("scale", {"scale": NAN}),
        ("softcap", {"softcap": 0.0}),
        ("window", {"window": 0}),
        ("sinks", {"sinks": torch.ones(3)}),
        ("sinks", {"sinks": torch.ones(6, dtype=torch.int32)}),
        ("query_start", {"query_start": torch.zeros(3, dtype=torch.int64)}),
        ("document_start", {"document_start": torch.zeros(2, 20, dtype=torch.int64)}),
        ("mask", {"mask": torch.ones(2, 6, 10, 20, dtype=torch.bool)}),
    ],
)
def test_an_illegal_argument_is_named(argument: str, wrong: dict[str, Any]) -> None:
    block_sparse_attention(**LEGAL)
    with pytest.raises(KernelArgumentError, match=rf"^{argument}: found .*; legal (is|are) "):
        block_sparse_attention(**{**LEGAL, **wrong})
