"""Two gloo ranks: a model of DTensors gives the numbers of one rank, sparse, and each rank selects for its own groups.

One pair of processes runs everything and writes down what it saw; the tests read. The quick run has a pair of its own,
with one hand-written model.
"""

import contextlib
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F

import msa_compile
from msa_compile.kernels.block_sparse_attention import cpu
from runtime.tiny import CONFIG, VOCAB, llama, tokens

RANKS = 2
SECONDS = 240  # many times what it takes on two idle cores
NAMES = ("llama", "tp_plan", "four groups")

QUICK = ("four groups",)

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="torch.distributed has no gloo here",
)
slow = pytest.mark.slow


class OneAttention(nn.Module):
    """Four groups of two heads; no width is spelled out, so that a rank may hold a part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 64)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
        self.o = nn.Linear(64, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def whole(name: str) -> nn.Module:
    if name != "four groups":
        return llama(layers=1)
    torch.manual_seed(0)
    return OneAttention().eval()


def sharded(name: str, folder: Path) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if name == "tp_plan":
        return loaded_by_plan(folder)
    columns, rows = ("q", "k", "v"), ("o",)
    if name == "llama":
        inner = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
        columns = tuple(f"model.layers.*.{part}_proj" for part in inner)
        rows = ("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj")
    plan = {**{part: ColwiseParallel() for part in columns}, **{part: RowwiseParallel() for part in rows}}
    return parallelize_module(whole(name), init_device_mesh("cpu", (RANKS,)), plan)


def loaded_by_plan(folder: Path) -> nn.Module:
    """The Llama as transformers itself loads and shards it."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    if distributed.get_rank() == 0:
        llama(layers=1).save_pretrained(folder / "llama")
    distributed.barrier()
    config = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    return LlamaForCausalLM.from_pretrained(folder / "llama", distributed_config=config).eval()


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[int, int, Tensor]]]:
    """Query heads, key heads and block ids of each sparse attention that runs."""
    seen: list[tuple[int, int, Tensor]] = []
    original = cpu.block_sparse_attention

    def recording(query: Tensor, key: Tensor, value: Tensor, block_ids: Tensor, *args: object, **kwargs: Any) -> Tensor:
        seen.append((query.shape[1], key.shape[1], block_ids.clone()))
        return original(query, key, value, block_ids, *args, **kwargs)

    with mock.patch.object(cpu, "block_sparse_attention", recording):
        yield seen


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out.square().mean().backward()
    grads = {name: entry.grad for name, entry in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def sparse(model: nn.Module, inner: str = "eager") -> nn.Module:
    return msa_compile.sparsify(model, CONFIG, inner=inner, example_inputs=(tokens(),))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def observe(name: str, model: nn.Module) -> dict[str, Any]:
    """What a sparsified model does."""
    with torch.no_grad(), recorded() as calls:
        seen: dict[str, Any] = {"logits": logits(model, tokens()), "calls": list(calls)}
    if name == "llama":
        seen["generated"] = model.generate(tokens(), max_new_tokens=3, do_sample=False)
        out = logits(model, tokens())
        seen |= {"training": out.detach(), "gradients": gradients(model, out)}
    return seen


def observe_lengths(model: nn.Module) -> dict[str, Any]:
    """Logits without and with gradients at two lengths each; the tensors that inference saw come back in training."""
    ids = [tokens(23), tokens(29)]
    with torch.no_grad():
        seen: dict[str, Any] = {"inference": [model(part) for part in ids]}
    outs = [model(part) for part in ids]
    seen["training"] = [out.detach() for out in outs]
    seen["gradients"] = [gradients(model, out) for out in outs]
    return seen


def work(rank: int, folder: Path, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder / 'meeting'}"
    patience = datetime.timedelta(seconds=SECONDS)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS, timeout=patience)
    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    results: dict[str, Any] = {}
    with mock.patch.dict("os.environ", here):
        for name in names:
            model = sharded(name, folder)
            before = dict(model.named_parameters())
            with torch.no_grad():
                dense = logits(model, tokens())
            found = len(msa_compile.explain(sparse(model)).sites)
            results[name] = {"found": found, **observe(name, model)}
            results[name]["dense calls"] = msa_compile.explain(model).dense_calls
            msa_compile.unsparsify(model)
            with torch.no_grad():
                results[name]["dense again"] = torch.equal(logits(model, tokens()), dense)
            after = dict(model.named_parameters())
            results[name]["same weights"] = all(after[key] is before[key] for key in before)
    if names != QUICK:
        results["aot_eager"] = observe_lengths(sparse(sharded("four groups", folder), "aot_eager"))
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


def run_ranks(folder: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    running = multiprocessing.spawn(work, (folder, names), nprocs=RANKS, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < end, f"the ranks did not finish in {SECONDS} s"
    finally:
        for process in running.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("ranks"), NAMES)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """The same on one rank."""
    seen = {name: observe(name, sparse(whole(name))) for name in ("llama", "four groups")}
    return {**seen, "tp_plan": seen["llama"]}


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def check_groups(calls: list[tuple[int, int, Tensor]], expected: list[tuple[int, int, Tensor]], rank: int) -> None:
    """A rank holds half of the heads, and selects for them what one rank selects."""
    [(queries, groups, ids)], [(all_queries, all_groups, all_ids)] = calls, expected
    assert (queries, groups) == (all_queries // RANKS, all_groups // RANKS)
    assert torch.equal(ids, all_ids[:, rank * groups : (rank + 1) * groups])


def test_two_ranks_give_the_numbers_of_one(tmp_path):
    expected = observe("four groups", sparse(whole("four groups")))
    with torch.no_grad():
        dense = logits(whole("four groups"), tokens())
    assert (dense - expected["logits"]).abs().max() > 1e-2, "or dense would pass too"
    for number, rank in enumerate(run_ranks(tmp_path, QUICK)):
        close(rank["four groups"]["logits"], expected["logits"])
        check_groups(rank["four groups"]["calls"], expected["calls"], number)


@slow
@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_the_numbers_of_one_rank(name, ranks, alone):
    with torch.no_grad():
        dense = logits(whole(name), tokens())
    assert (dense - alone[name]["logits"]).abs().max() > 1e-2, "or dense would pass too"
    for rank in ranks:
        close(rank[name]["logits"], alone[name]["logits"])


@slow
def test_every_rank_generates_the_tokens_of_one_rank(ranks, alone):
    for rank in ranks:
        assert torch.equal(rank["llama"]["generated"], alone["llama"]["generated"])


@slow
@pytest.mark.parametrize("name", NAMES)
def test_each_rank_selects_for_its_own_groups(name, ranks, alone):
    for number, rank in enumerate(ranks):
        check_groups(rank[name]["calls"], alone[name]["calls"], number)


@slow
def test_gradients_are_those_of_one_rank(ranks, alone):
    expected = alone["llama"]["gradients"]
    for rank in ranks:
        close(rank["llama"]["training"], alone["llama"]["training"])
        assert rank["llama"]["gradients"].keys() == expected.keys()
        for key, grad in rank["llama"]["gradients"].items():
            torch.testing.assert_close(grad, expected[key], atol=1e-6, rtol=1e-4)


@slow
@pytest.mark.parametrize("name", NAMES)
def test_sites_are_found_at_once_and_nothing_is_left_behind(name, ranks):
    for rank in ranks:
        assert rank[name]["found"] == 1
        assert rank[name]["dense calls"] == 0
        assert rank[name]["dense again"]
        assert rank[name]["same weights"]


@slow
def test_aot_autograd_compiles_it_for_inference_and_for_training_at_two_lengths(ranks):
    expected = observe_lengths(sparse(whole("four groups")))
    for rank in ranks:
        seen = rank["aot_eager"]
        for part in ("inference", "training"):
            for got, wanted in zip(seen[part], expected[part], strict=True):
                close(got, wanted)
        for got, wanted in zip(seen["gradients"], expected["gradients"], strict=True):
            for key, grad in got.items():
                torch.testing.assert_close(grad, wanted[key], atol=1e-6, rtol=1e-4)
