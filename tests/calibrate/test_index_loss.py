"""`index_loss` in a loop of the user's own: its value, whom it teaches, and under gradient checkpointing."""

import copy

import pytest
import torch
from runtime.tiny import llama, small, sparse, tokens
from torch import nn

import msa_compile
from msa_compile import MSAConfig, errors
from msa_compile.indexer import IndexBranch

LEARNED = MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned")
IDS = tokens(37)


def learned(make=llama, config=LEARNED, inner="eager"):
    """A sparse model whose attention and whose branches choose, in training mode."""
    model = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    example = {} if make is llama else {"example_inputs": (IDS,)}
    model = msa_compile.sparsify(model, config, inner=inner, **example)
    for module in model.modules():
        if isinstance(module, IndexBranch):
            for weight in module.weights():
                nn.init.normal_(weight, std=0.3, generator=generator)
    return model.train()


def step(model, factor=1.0, **inputs):
    """Both losses, and every gradient."""
    model.zero_grad()
    inputs = inputs or {"input_ids": IDS}
    out = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    loss = msa_compile.index_loss(model)
    (out.loss + factor * loss).backward()
    return out.loss.item(), loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def only_branches(gradients):
    return {name: gradient for name, gradient in gradients.items() if ".indexer." in name}


def test_it_teaches_the_branches_alone_and_the_models_own_loss_does_not():
    model = learned()
    _, loss, once = step(model)
    _, again, thrice = step(model, factor=3.0)
    assert loss == pytest.approx(again)
    for name, gradient in once.items():
        factor = 3.0 if ".indexer." in name else 1.0
        torch.testing.assert_close(thrice[name], factor * gradient, rtol=1e-4, atol=1e-7)
    assert all(gradient.abs().max() > 1e-6 for gradient in only_branches(once).values())
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".indexer." in name)


@pytest.mark.slow
def test_with_every_block_selected_it_is_the_loss_of_calibration():
    everything = MSAConfig(block_size=4, topk_blocks=10, dense_below=0, indexer="learned")
    model = learned(small, everything)
    model(IDS)
    loss = msa_compile.index_loss(model).item()
    few = learned(small)
    few.load_state_dict(model.state_dict())
    few(IDS)
    assert msa_compile.index_loss(few).item() != pytest.approx(loss, rel=0.01), "selected blocks alone"
    options = {"steps": 1, "learning_rate": 1e-9, "stage": "align", "min_mass_ratio": 0.0, "progress": False}
    found = msa_compile.calibrate(few, [IDS, IDS], **options)
    assert sum(found.history[0]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_what_lies_in_padding_changes_nothing():
    mask = (torch.arange(37) >= torch.tensor([[0], [9]])).long()
    found = []
    for shift in (0, 5):
        ids = torch.where(mask == 1, IDS, (IDS - 3 + shift) % 47 + 3)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model = learned()
        model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
        found.append(msa_compile.index_loss(model))
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_under_gradient_checkpointing_the_gradients_are_the_same(inner):
    *losses, plain = step(learned(inner=inner))
    model = learned(inner=inner)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    *found, checkpointed = step(model)
    assert found == pytest.approx(losses, rel=1e-5)
    assert all(gradient.abs().max() > 1e-6 for gradient in only_branches(checkpointed).values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_the_gradients_lie_in_memory_as_the_fake_says():
    """A compiler that trusts the fake would read others."""
    query, key = torch.randn(2, 9, 4, 8).transpose(1, 2), torch.randn(2, 9, 2, 8).transpose(1, 2)
    index_query, index_key = torch.randn(2, 9, 2, 8).transpose(1, 2), torch.randn(2, 9, 1, 8).transpose(1, 2)
    ids = torch.zeros(2, 2, 9, 1, dtype=torch.int32)
    for found in torch.ops.msa.index_loss(index_query, index_key, query, key, ids, 16):
        assert found.is_contiguous()


@pytest.mark.slow
def test_compiled_by_inductor_it_is_the_same_loss_with_the_same_gradients():
    *losses, expected = step(learned())
    *found, gradients = step(learned(inner="inductor"))
    assert found == pytest.approx(losses, rel=1e-5)
    assert all(gradient.abs().max() > 1e-6 for gradient in only_branches(gradients).values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_there_is_none_where_nothing_trains():
    model = learned(small)
    with pytest.raises(errors.NoIndexLossError, match="call the model before"):
        msa_compile.index_loss(model)
    for change in (model.eval, lambda: model.train().requires_grad_(False)):
        change()
        model(IDS)
        with pytest.raises(errors.NoIndexLossError):
            msa_compile.index_loss(model)
    with pytest.raises(errors.NotSparseError):
        msa_compile.index_loss(small())
    keys = sparse(small(), MSAConfig(block_size=4, topk_blocks=3, dense_below=0)).train()
    keys(IDS)
    with pytest.raises(errors.NoIndexLossError):
        msa_compile.index_loss(keys)


@pytest.mark.slow
def test_a_trainer_adds_it_to_its_loss(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class WithIndexLoss(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **rest):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **rest)
            loss = loss + msa_compile.index_loss(model)
            return (loss, outputs) if return_outputs else loss

    model = learned()
    before = copy.deepcopy(only_branches(dict(model.named_parameters())))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True, remove_unused_columns=False, gradient_checkpointing=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens(37, batch=4)]
    WithIndexLoss(model=model, args=arguments, train_dataset=data).train()
    after = only_branches(dict(model.named_parameters()))
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in before if "proj" in name)
