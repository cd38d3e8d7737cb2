"""The index branch as a module, how it is inserted and when it is used."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import msa_compile
from msa_compile import MSAConfig
from msa_compile.errors import ConfigError
from msa_compile.indexer import IndexBranch, insert_index_branch, weights_in_use

BUDGET = {"block_size": 4, "topk_blocks": 3, "dense_below": 0}
LEARNED = MSAConfig(**BUDGET, indexer="learned")
IDS = torch.randint(3, 50, (2, 37), generator=torch.Generator().manual_seed(0))


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=50, **options)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def sparse(model: nn.Module, config: MSAConfig = LEARNED) -> nn.Module:
    return msa_compile.sparsify(model, config, inner="eager")


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def indexers_of(model: nn.Module) -> list[str | None]:
    return [site.indexer for site in msa_compile.explain(model, input_ids=IDS, use_cache=False).sites]


def test_names_and_heads_are_those_of_minimax_m3():
    m3 = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

    config = MiniMaxM3VLTextConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, head_dim=16,
        index_n_heads=2, index_head_dim=16, layer_types=["minimax_m3_sparse"], mlp_layer_types=["dense"],
    )  # fmt: skip
    theirs = m3.MiniMaxM3VLIndexer(config, layer_idx=0)
    nn.init.normal_(theirs.q_norm.weight)
    ours = IndexBranch(32, 2, 16)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 7, 32)
    heads = ours(x)
    expected = theirs.q_norm(theirs.q_proj(x).view(3, 7, 2, 16)).transpose(1, 2)
    torch.testing.assert_close(heads.query, expected)
    torch.testing.assert_close(heads.key, theirs.k_norm(theirs.k_proj(x).view(3, 7, 1, 16)).transpose(1, 2))


def test_a_branch_is_part_of_the_model_until_unsparsify(caplog):
    plain = llama().to(torch.bfloat16)
    names, expected = list(plain.state_dict()), logits(plain)
    model = sparse(plain)
    assert "1 index branches are not trained" in caplog.text
    branch = model.model.layers[0].self_attn.indexer
    assert {parameter.dtype for parameter in branch.parameters()} == {torch.bfloat16}
    added = [name for name in model.state_dict() if name not in names]
    assert added == [f"model.layers.0.self_attn.indexer.{name}" for name in branch.state_dict()]
    with msa_compile.dense(model):
        assert list(model.state_dict()) == names
        assert torch.equal(logits(model), expected)
    assert model.model.layers[0].self_attn.indexer is branch
    msa_compile.unsparsify(model)
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), expected)


def test_auto_uses_a_branch_from_its_calibration_on():
    model = sparse(llama(), MSAConfig(**BUDGET))
    owner = model.model.layers[0].self_attn
    by_keys = logits(model)
    assert insert_index_branch(owner, 64, 2, 8, is_forced=False)
    branch = owner.indexer
    for weight in branch.weights():
        nn.init.normal_(weight, std=0.3)
    assert weights_in_use(owner) == []
    assert torch.equal(logits(model), by_keys), "nothing runs on an untrained branch by itself"
    assert indexers_of(model) == ["keys"]
    branch.is_calibrated = True
    learned = logits(model)
    assert indexers_of(model) == ["learned"]
    assert (learned - by_keys).abs().max() > 1e-2
    assert torch.equal(logits(copy.deepcopy(model)), learned)
    branch.is_calibrated = False
    assert torch.equal(logits(model), by_keys)


def test_selection_gives_a_branch_no_gradient_and_the_model_its_own():
    config = MSAConfig(block_size=4, topk_blocks=64, dense_below=0, indexer="learned")
    dense = llama().train()
    model = sparse(copy.deepcopy(dense), config)
    for each in (dense, model):
        each(IDS, labels=IDS, use_cache=False).loss.backward()
    found = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(found.pop(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)
    assert len(found) == 4
    assert all(parameter.grad is None for parameter in found.values())


def test_under_checkpointing_the_branch_selects_in_each_region():
    dense = llama()
    expected = logits(sharpened(sparse(copy.deepcopy(dense))))
    dense.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = sharpened(sparse(dense)).train()
    out = model(IDS, labels=IDS, use_cache=False)
    assert torch.allclose(out.logits, expected, atol=1e-5)
    out.loss.backward()
    assert [site.indexer for site in msa_compile.explain(model).sites] == ["learned"]


def sharpened(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for weight in model.model.layers[0].self_attn.indexer.weights():
        nn.init.normal_(weight, std=0.3)
    return model


class Odd(nn.Module):
    """A model with an attention that has a reason to stay with `"keys"`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(50, 32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        if kind == "name taken":
            self.indexer = nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        y = self.attend(x)
        return self.attend(y) if self.kind == "twice" else y

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.kind == "not linear":
            k = (k * torch.arange(k.shape[2])[:, None]).sin()
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("not linear", "rotary embedding"), ("twice", "several attentions"), ("name taken", "no index branch for it")],
)
def test_a_site_that_is_not_proved_scores_with_keys_and_says_why(kind, why):
    torch.manual_seed(0)
    plain = Odd(kind).eval()
    names = list(plain.state_dict())
    by_keys = msa_compile.sparsify(copy.deepcopy(plain), MSAConfig(**BUDGET), inner="eager", example_inputs=(IDS,))
    model = msa_compile.sparsify(plain, LEARNED, inner="eager", example_inputs=(IDS,))
    with torch.no_grad():
        assert torch.equal(model(IDS), by_keys(IDS))
    report = msa_compile.explain(model)
    assert {site.indexer for site in report.sites} == {"keys"}
    assert any(why in site.detail for site in report.sites)
    assert list(model.state_dict()) == names


def test_the_backend_alone_has_no_learned_indexer():
    compiled = torch.compile(llama(), backend="msa", options={"indexer": "learned", "inner": "eager"})
    with pytest.raises(Exception, match=r"use msa_compile\.sparsify") as caught:
        logits(compiled)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), ConfigError)
