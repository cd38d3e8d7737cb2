"""The streaming loss and its analytic gradient equal a naive computation under autograd, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msa_compile.kernels import select_blocks
from msa_compile.kernels.index_loss import align_loss as module
from msa_compile.kernels.index_loss.align_loss import Support, align_loss, align_sums

B, HKV, G, D, DH, T = 2, 2, 3, 8, 5, 29


def tensors(length=T, dtype=torch.float64, key_heads=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def some(heads, width):
        return (2 * torch.randn(B, heads, length, width, generator=generator, dtype=torch.float64)).to(dtype)

    index_query, index_key = some(HKV, D).requires_grad_(), some(key_heads, D).requires_grad_()
    return index_query, index_key, some(HKV * G, DH), some(HKV, DH)


def naive(index_query, index_key, query, key, allowed, counted, left=None, **options):
    """Row by row, head by head, from the formulas; `allowed` and what of it is left out: bool `[B, Hkv, Tq, Tk]`."""
    total, number = index_query.new_zeros(()), 0
    left = torch.zeros_like(allowed) if left is None else left
    softcap, power = options.get("softcap"), options.get("power", 1.0)
    scale, factor = options.get("scale", DH**-0.5), options.get("index_scale", D**-0.5)
    for b, i in itertools.product(range(query.shape[0]), range(query.shape[2])):
        if not counted[b, i] or not (allowed & ~left)[b, 0, i].any():
            continue
        number += 1
        for r in range(HKV):
            support = allowed[b, r, i].nonzero()[:, 0]
            heads = []
            for h in range(r * G, (r + 1) * G):
                logits = key[b, r, support] @ query[b, h, i] * scale
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                heads.append(logits.softmax(0))
            teacher = torch.stack(heads).mean(0).detach()[~left[b, r, i, support]]
            weight, support = teacher.sum(), support[~left[b, r, i, support]]
            teacher = teacher**power / (teacher**power).sum()
            shared = min(r, index_key.shape[1] - 1)
            scores = index_key[b, shared, support] @ index_query[b, r, i] * factor
            total = total + weight * (teacher * (teacher.log() - scores.log_softmax(0))).sum() / HKV
    return total / max(number, 1)


def causal(length=T):
    return torch.ones(length, length, dtype=torch.bool).tril().expand(B, HKV, -1, -1).clone()


def everyone(length=T):
    return torch.ones(B, length, dtype=torch.bool)


def check(parts, support, allowed, counted, left=None, **options):
    """Loss and gradients against the naive ones; returns the loss."""
    wanted = naive(*parts, allowed, counted, left, **options)
    want = torch.autograd.grad(wanted, parts[:2]) if wanted.requires_grad else [torch.zeros_like(x) for x in parts[:2]]
    loss = align_loss(*parts, support, **options)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-12)
    for mine, theirs in zip(torch.autograd.grad(loss, parts[:2]), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
    return loss.item()


@pytest.mark.parametrize("workspace", [1, B * HKV * G * 30, 1 << 22])
@pytest.mark.parametrize("key_heads", [1, HKV])
def test_loss_and_gradient_equal_autograd_whatever_the_tiles(workspace, key_heads, monkeypatch):
    monkeypatch.setattr(module, "_WORKSPACE", workspace)
    assert check(tensors(key_heads=key_heads), None, causal(), everyone()) > 0.1


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"scale": 0.3, "index_scale": 0.7}])
def test_scales_and_the_softcap_of_attention_are_used(options):
    plain = check(tensors(), None, causal(), everyone())
    assert check(tensors(), None, causal(), everyone(), **options) != pytest.approx(plain)


def test_padding_on_either_side_is_left_out():
    parts = tensors()
    counted = everyone()
    counted[0, 20:] = False
    counted[1, :7] = False
    allowed = causal() & counted[:, None, None, :]
    support = Support(counted=counted, key_start=torch.tensor([0, 7]), key_end=torch.tensor([20, T]))
    assert check(parts, support, allowed, counted) > 0.1
    masked = Support(counted=counted, mask=counted[:, None, None, :])
    check(parts, masked, allowed, counted)


@pytest.mark.parametrize("has_mask", [False, True])
def test_what_lies_in_padding_reaches_nothing(has_mask):
    parts = tensors()
    counted = everyone()
    counted[:, 20:] = False
    support = Support(counted=counted, key_end=torch.tensor([20, 20]))
    if has_mask:
        support = Support(counted=counted, mask=counted[:, None, None, :])
    want = align_loss(*parts, support)
    poisoned = [part.detach().clone() for part in parts]
    for part in poisoned:
        part[:, :, 20:] = torch.nan
    found = align_loss(*(part.requires_grad_() for part in poisoned), support)
    assert found.item() == want.item()
    for mine, theirs in zip(
        torch.autograd.grad(found, poisoned[:2]), torch.autograd.grad(want, parts[:2]), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_packed_documents_do_not_see_each_other(monkeypatch):
    monkeypatch.setattr(module, "_WORKSPACE", B * HKV * G * 25)
    start = torch.zeros(B, T, dtype=torch.int64)
    start[0, 11:], start[1, 5:], start[1, 23:] = 11, 5, 23
    allowed = causal() & (torch.arange(T) >= start[:, None, :, None])
    both = check(tensors(), Support(document_start=start), allowed, everyone())
    assert both != pytest.approx(align_loss(*tensors()).item())


def test_a_chunk_of_queries_on_a_longer_past_and_a_window():
    index_query, index_key, query, key = tensors()
    late = [index_query[:, :, 20:].detach().requires_grad_(), index_key, query[:, :, 20:], key]
    place = torch.arange(20, T)[:, None]
    allowed = (torch.arange(T) <= place) & (torch.arange(T) > place - 6)
    check(late, Support(window=6), allowed.expand(B, HKV, -1, -1), everyone(T - 20))


@pytest.mark.parametrize("workspace", [1, B * HKV * G * 30, 1 << 22])
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_selected_support_is_that_of_the_blocks(workspace, is_packed, monkeypatch):
    monkeypatch.setattr(module, "_WORKSPACE", workspace)
    parts = tensors()
    start = torch.zeros(B, T, dtype=torch.int64)
    if is_packed:
        start[:, 10:] = 10
    ids = select_blocks(parts[0].detach(), parts[1].detach(), block_size=4, topk=2, document_start=start)
    allowed = torch.zeros(B, HKV, T, T, dtype=torch.bool)
    for b, r, i in itertools.product(range(B), range(HKV), range(T)):
        for block in ids[b, r, i].tolist():
            if block >= 0:
                first = int(start[b, i]) + 4 * block
                allowed[b, r, i, first : min(first + 4, i + 1)] = True
    assert not torch.equal(allowed[:, 0], allowed[:, 1]), "groups choose for themselves"
    support = Support(block_ids=ids, block_size=4, document_start=start)
    sparse = check(parts, support, allowed, everyone())
    full = align_loss(*parts, Support(document_start=start)).item()
    assert sparse != pytest.approx(full)
    everything = select_blocks(parts[0].detach(), parts[1].detach(), block_size=4, topk=8, document_start=start)
    all_blocks = Support(block_ids=everything, block_size=4, document_start=start)
    assert align_loss(*parts, all_blocks).item() == pytest.approx(full)


@pytest.mark.parametrize("workspace", [1, B * HKV * G * 30, 1 << 22])
@pytest.mark.parametrize(("power", "local_blocks", "sink_blocks"), [(2.0, 0, 0), (2.0, 1, 0), (1.5, 2, 1), (1.0, 1, 1)])
def test_raised_teachers_and_blocks_that_are_left_out(workspace, power, local_blocks, sink_blocks, monkeypatch):
    monkeypatch.setattr(module, "_WORKSPACE", workspace)
    start = torch.zeros(B, T, dtype=torch.int64)
    start[1, 10:] = 10
    allowed = causal() & (torch.arange(T) >= start[:, None, :, None])
    block = (torch.arange(T)[None, None] - start[..., None]).clamp(min=0) // 4  # [B, Tq, Tk]
    own = ((torch.arange(T) - start) // 4)[..., None]
    left = (block < sink_blocks) | ((block > own - local_blocks) & (block <= own))
    left = left[:, None].expand(-1, HKV, -1, -1)
    forced = {"local_blocks": local_blocks, "sink_blocks": sink_blocks, "block_size": 4}
    support = Support(document_start=start, **forced)
    found = check(tensors(), support, allowed, everyone(), left, power=power)
    assert found != pytest.approx(align_loss(*tensors(), Support(document_start=start)).item())
    counted = int((allowed & ~left)[:, 0].any(-1).sum())
    sums = align_sums(*(part.detach() for part in tensors()), support, power=power)
    assert int(sums.queries) == counted
    assert counted == B * T or local_blocks or sink_blocks


def test_a_query_that_gives_next_to_nothing_to_what_is_compared_changes_next_to_nothing():
    index_query, index_key, query, key = (part.detach().float() for part in tensors())
    key = torch.where(torch.arange(T)[:, None] % 4 == 3, key, -1e3)  # squares of what is far are 0 in float32
    sums = align_sums(index_query, index_key, query.abs(), key, Support(block_size=4, local_blocks=1), power=2.0)
    assert all(part.isfinite().all() for part in (sums.loss, sums.grad_index_query, sums.grad_index_key))


def test_a_student_that_knows_the_teacher_has_no_loss_and_no_gradient():
    _, _, query, key = tensors(key_heads=HKV)
    query = query.view(B, HKV, G, T, DH)[:, :, :1].expand(-1, -1, G, -1, -1).flatten(1, 2)
    index_query, index_key = query[:, ::G].clone().requires_grad_(), key.clone().requires_grad_()
    loss = align_loss(index_query, index_key, query, key)
    assert loss.item() == pytest.approx(0.0, abs=1e-14)
    assert all(float(grad.abs().max()) < 1e-14 for grad in torch.autograd.grad(loss, (index_query, index_key)))


def test_the_teacher_is_the_mean_of_probabilities_and_not_of_logits():
    index_query, index_key, query, key = tensors()
    mean = query.view(B, HKV, G, T, DH).mean(2, keepdim=True).expand(-1, -1, G, -1, -1).flatten(1, 2)
    assert align_loss(index_query, index_key, mean, key).item() != pytest.approx(
        align_loss(index_query, index_key, query, key).item(), rel=1e-2
    )


def test_only_the_index_branch_has_a_gradient():
    parts = [part.detach().requires_grad_() for part in tensors()]
    align_loss(*parts).backward()
    assert [part.grad is not None for part in parts] == [True, True, False, False]
    assert all(float(part.grad.abs().max()) > 0 for part in parts[:2])


def test_nothing_to_compare_is_no_loss_and_no_gradient():
    parts = tensors()
    loss = align_loss(*parts, Support(counted=~everyone()))
    loss.backward()
    assert loss.item() == 0.0
    assert all(float(part.grad.abs().max()) == 0.0 for part in parts[:2])
    nobody = Support(mask=torch.zeros(1, 1, 1, T, dtype=torch.bool))
    assert align_loss(*parts, nobody).item() == 0.0


def test_shards_add_up_to_the_whole():
    parts = [part.detach() for part in tensors()]
    whole = align_sums(*parts, Support())
    shards = [align_sums(*(part[b : b + 1] for part in parts), Support()) for b in range(B)]
    assert int(whole.queries) == sum(int(shard.queries) for shard in shards) == B * T
    torch.testing.assert_close(whole.loss, shards[0].loss + shards[1].loss)
    torch.testing.assert_close(whole.grad_index_query, torch.cat([shard.grad_index_query for shard in shards]))
    assert align_sums(*parts, Support(), has_gradients=False).grad_index_key is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_float32(dtype):
    parts = tensors(dtype=dtype)
    exact = [part.detach().double() for part in parts]
    exact = [part.requires_grad_() for part in exact[:2]] + exact[2:]
    want = align_loss(*exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss = align_loss(*parts)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for mine, theirs in zip(torch.autograd.grad(loss, parts[:2]), torch.autograd.grad(want, exact[:2]), strict=True):
        assert mine.dtype == dtype
        tolerance = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=1e-7)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes; a view makes none."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf)]
        sizes = [leaf.numel() for leaf in made if leaf.untyped_storage()._cdata not in old]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("is_sparse", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(is_sparse, monkeypatch):
    monkeypatch.setattr(module, "_WORKSPACE", 1 << 12)
    most = []
    for length in (256, 512):
        parts = [part[:1].detach().clone() for part in tensors(length, torch.float32)]
        support = Support()
        if is_sparse:
            support = replace(support, block_ids=torch.zeros(1, HKV, length, 2, dtype=torch.int32), block_size=16)
        with Largest() as largest:
            align_sums(*parts, support)
        most.append(largest.elements)
    assert most[1] <= 2 * most[0]
    assert most[1] == 512 * HKV * D, "the gradient of the index queries is the largest"
