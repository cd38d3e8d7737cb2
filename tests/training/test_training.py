"""Loss and gradients through a sparse model are those of masked dense attention over the chosen blocks."""

import copy

import pytest
import torch
from oracle_training import sparse_reference
from torch import nn

import msa_compile
from msa_compile import MSAConfig

transformers = pytest.importorskip("transformers")

BLOCK, TOPK, LENGTH, LAYERS = 4, 3, 29, 2
FEW = MSAConfig(block_size=BLOCK, topk_blocks=TOPK, dense_below=0)
FULL = MSAConfig(block_size=BLOCK, topk_blocks=64, dense_below=0)
REFERENCE = {"groups": 2, "block_size": BLOCK, "topk": TOPK}


def llama(**changes):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
        **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    with torch.no_grad():  # attention that chooses: fresh weights score all keys alike
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12.0)
    return model


def ids_of(batch=2, length=LENGTH):
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(length))


def left_padding(batch=2, length=LENGTH):
    return (torch.arange(length) >= torch.tensor([[0], [5]])[:batch]).long()


def call_of(padded):
    ids = ids_of()
    if not padded:
        return {"input_ids": ids, "labels": ids}
    mask = left_padding()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": torch.where(mask == 1, ids, -100),
    }


def step(model, call):
    """The loss and every gradient of one training step."""
    model.zero_grad(set_to_none=True)
    loss = model(**call).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(got, expected, tolerance=1e-4):
    torch.testing.assert_close(got[0], expected[0], atol=tolerance, rtol=tolerance)
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        size = grad.abs().max()
        assert size > 0, f"{name} has no gradient in the reference"
        torch.testing.assert_close(
            got[1][name], grad, atol=tolerance * float(size), rtol=tolerance, msg=f"{name}: {{}}"
        )


def reference_step(model, call):
    with sparse_reference(**REFERENCE) as shares:
        expected = step(copy.deepcopy(model), call)
    assert shares
    assert max(shares) < 0.9, "the reference must leave something out"
    return expected


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_few_blocks_train_like_masked_dense_attention(inner, padded, sparse_calls):
    model, call = llama(), call_of(padded)
    expected, dense = reference_step(model, call), step(copy.deepcopy(model), call)
    msa_compile.sparsify(model, FEW, inner=inner)
    got = step(model, call)
    assert_same_step(got, expected)
    assert len(sparse_calls) == LAYERS
    assert (
        got[1]["model.layers.0.self_attn.q_proj.weight"] - dense[1]["model.layers.0.self_attn.q_proj.weight"]
    ).abs().max() > 1e-5


def test_few_blocks_train_the_same_under_inductor(sparse_calls):
    model, call = llama(), call_of(True)
    expected = reference_step(model, call)
    msa_compile.sparsify(model, FEW)
    assert_same_step(step(model, call), expected)
    assert len(sparse_calls) == LAYERS


def test_a_full_budget_trains_like_the_dense_model(sparse_calls):
    model = llama()
    expected = {padded: step(copy.deepcopy(model), call_of(padded)) for padded in (False, True)}
    msa_compile.sparsify(model, FULL, inner="aot_eager")
    for padded in (False, True):
        assert_same_step(step(model, call_of(padded)), expected[padded])
    assert len(sparse_calls) == 2 * LAYERS


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_activation_checkpointing_recomputes_sparse_attention(inner, sparse_calls):
    model, call = llama(), call_of(True)
    expected = reference_step(model, call)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    msa_compile.sparsify(model, FEW, inner=inner, example_inputs=call)
    sites = msa_compile.explain(model).sites
    assert [site.name for site in sites] == [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
    assert {site.decision for site in sites} == {"sparse"}
    loss = model(**call).loss
    assert len(sparse_calls) == LAYERS
    loss.backward()
    assert len(sparse_calls) == 2 * LAYERS, "every layer is computed again in the backward pass"
    assert_same_step(step(model, call), expected)
    assert msa_compile.explain(model).dense_calls == 0


def test_checkpointing_enabled_after_sparsify_stays_sparse(sparse_calls):
    model, call = llama(), call_of(True)
    expected = reference_step(model, call)
    msa_compile.sparsify(model, FEW, inner="eager")
    step(model, call)
    before = len(sparse_calls)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_step(step(model, call), expected)
    assert len(sparse_calls) - before == 2 * LAYERS
    assert msa_compile.explain(model).dense_calls == 0


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_bf16_trains_close_to_its_dense_self(inner, sparse_calls):
    model, call = llama(), call_of(True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(copy.deepcopy(model), call)
        logits = model(**call).logits
    msa_compile.sparsify(model, FULL, inner=inner)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, call)
        sparse_logits = model(**call).logits
    assert sparse_logits.dtype == logits.dtype == torch.bfloat16
    assert len(sparse_calls) == 2 * LAYERS
    torch.testing.assert_close(got[0], expected[0], atol=2e-2, rtol=2e-2)
    for name, grad in expected[1].items():
        assert got[1][name].dtype == grad.dtype == torch.float32
        assert got[1][name].isfinite().all()
        angle = torch.nn.functional.cosine_similarity(got[1][name].flatten(), grad.flatten(), dim=0)
        assert angle > 0.98, f"{name}: {angle}"


def test_a_bf16_model_trains_in_bf16(sparse_calls):
    model, call = llama().bfloat16(), call_of(True)
    expected = step(copy.deepcopy(model), call)
    msa_compile.sparsify(model, FULL, inner="aot_eager")
    got = step(model, call)
    torch.testing.assert_close(got[0], expected[0], atol=2e-2, rtol=2e-2)
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in got[1].values())
    assert len(sparse_calls) == LAYERS


class Amplified(torch.autograd.Function):
    """Twice the input, with a gradient that no re-trace of the forward would give."""

    @staticmethod
    def forward(ctx, x):
        return x * 2.0

    @staticmethod
    def backward(ctx, grad):
        return grad * 31.0


class WithCustomFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.llama = llama()
        self.mix = nn.Linear(50, 50)

    def forward(self, input_ids, labels, attention_mask=None, position_ids=None):
        out = self.llama(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        logits = self.mix(Amplified.apply(out.logits))
        out.loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return out


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_custom_gradient_elsewhere_is_kept(inner, sparse_calls):
    torch.manual_seed(1)
    model, call = WithCustomFunction(), call_of(True)
    expected = reference_step(model, call)
    msa_compile.sparsify(model, FEW, inner=inner, example_inputs=call)
    assert_same_step(step(model, call), expected)
    assert len(sparse_calls) == LAYERS


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_frozen_parameters_get_no_gradient_and_the_rest_get_theirs(inner, sparse_calls):
    model, call = llama(), call_of(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name and "mlp" not in name)
    expected = reference_step(model, call)
    msa_compile.sparsify(model, FEW, inner=inner)
    got = step(model, call)
    assert set(got[1]) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert_same_step(got, expected)
    model.requires_grad_(True)
    torch._dynamo.reset()
    assert len(step(model, call)[1]) == len(list(model.parameters()))
    assert len(sparse_calls) == 2 * LAYERS


def test_freezing_after_a_step_is_seen(sparse_calls):
    model, call = llama(), call_of(True)
    msa_compile.sparsify(model, FEW, inner="aot_eager")
    step(model, call)
    model.model.layers[0].requires_grad_(False)
    _, grads = step(model, call)
    assert not any("layers.0" in name for name in grads)
    model.model.layers[0].requires_grad_(True)
    _, grads = step(model, call)
    assert any("layers.0" in name for name in grads)
    assert len(sparse_calls) == 3 * LAYERS


def test_a_few_optimizer_steps_lower_the_loss_and_move_no_dense_twin(sparse_calls):
    model, call = llama(), call_of(False)
    twin = copy.deepcopy(model)
    msa_compile.sparsify(model, FEW, inner="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(float(step(model, call)[0]))
        optimizer.step()
    with sparse_reference(**REFERENCE):
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
        expected = []
        for _ in range(5):
            expected.append(float(step(twin, call)[0]))
            optimizer.step()
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected, abs=2e-3)
    assert len(sparse_calls) == 5 * LAYERS
