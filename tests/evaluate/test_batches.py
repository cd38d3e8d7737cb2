"""A batch is understood as it is meant: which tokens count, where they stand, and what is no batch."""

import contextlib

import pytest
import torch
from torch import nn

from msa_compile import errors
from msa_compile.batches import IGNORED, check_iterable, logits_of, quiet, read_batch

IDS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])


class Names(nn.Module):
    """Takes what transformers models take."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None, use_cache=None):
        return input_ids


class Plain(nn.Module):
    def forward(self, idx):
        return idx


class Needs(nn.Module):
    def forward(self, input_ids, labels, speed):
        return input_ids


class Bare(nn.Module):
    def forward(self, *parts):
        return parts[0]


def target(*rows):
    return torch.tensor([[IGNORED if label is None else label for label in row] for row in rows])


def test_the_next_token_is_the_target_and_the_last_has_none():
    batch = read_batch(Plain(), IDS)
    assert torch.equal(batch.target, target([12, 13, 14, None], [22, 23, 24, None]))
    assert torch.equal(batch.position, torch.arange(4).expand(2, 4))
    assert (batch.name, batch.args[0].tolist(), batch.kwargs) == ("idx", IDS.tolist(), {})
    assert batch.counted == 6


@pytest.mark.parametrize("given", [IDS, (IDS,), [IDS], {"input_ids": IDS}, {"input_ids": IDS.int()}])
def test_every_way_to_give_the_same_ids_means_the_same(given):
    batch = read_batch(Names(), given)
    assert (batch.name, batch.ids.tolist(), batch.counted) == ("input_ids", IDS.tolist(), 6)


def test_a_tuple_is_read_by_the_names_of_forward():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    batch = read_batch(Names(), (IDS, mask))
    assert torch.equal(batch.real, mask.bool())
    assert read_batch(Bare(), (IDS, mask)).counted == 6, "a part without a name is no mask"


def test_padding_counts_on_neither_side_and_moves_positions():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    batch = read_batch(Names(), {"input_ids": IDS, "attention_mask": mask})
    assert torch.equal(batch.target, target([12, 13, None, None], [None, None, 24, None]))
    assert batch.position[1].tolist() == [0, 0, 0, 1]
    assert batch.position[0, :3].tolist() == [0, 1, 2]
    hole = read_batch(Names(), {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0, 1]] * 2)})
    assert torch.equal(hole.target, target([12, None, None, None], [22, None, None, None]))


def test_labels_say_what_counts_and_are_not_handed_on():
    labels = torch.tensor([[IGNORED, IGNORED, 13, 14], [21, 22, IGNORED, 24]])
    batch = read_batch(Names(), {"input_ids": IDS, "labels": labels})
    assert torch.equal(batch.target, target([None, 13, 14, None], [22, None, 24, None]))
    assert set(batch.kwargs) == {"input_ids", "use_cache"}
    assert batch.kwargs["use_cache"] is False
    needed = read_batch(Needs(), {"input_ids": IDS, "labels": labels, "speed": 3})
    assert set(needed.kwargs) == {"input_ids", "labels", "speed"}
    assert torch.equal(needed.target, batch.target)


def test_a_packed_document_starts_anew_and_is_not_predicted_from_the_one_before():
    packed = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 0, 1]])}
    batch = read_batch(Names(), packed)
    assert torch.equal(batch.target, target([12, None, 14, None], [22, None, 24, None]))
    assert batch.position.tolist() == [[0, 1, 0, 1]] * 2


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("text", "a batch is a str; it has to be a dict"),
        ({"input_ids": IDS.float()}, r"no token ids in a batch of {input_ids: \[2, 4\] torch.float32"),
        ({"input_ids": IDS[0]}, r"no token ids .* integer tensor \[B, T\]"),
        ({"ids": IDS}, r"Names.forward cannot be called with a batch of ids: missing .*'input_ids'. Its signature is"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels is \[2, 3\] torch.int64; .* \[2, 4\]"),
        ({"input_ids": IDS, "labels": [1, 2]}, "labels is list"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 3)}, r"attention_mask is \[2, 3\] for token ids \[2, 4\]"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)}, "mask .* only: give one, or labels"),
    ],
)
def test_what_is_no_batch_says_what_was_found(given, match):
    with pytest.raises(errors.BatchError, match=match):
        read_batch(Names(), given)


def test_a_mask_of_queries_and_keys_will_do_with_labels():
    given = {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4), "labels": IDS}
    assert read_batch(Names(), given).counted == 6


@pytest.mark.parametrize("batches", [IDS, {"input_ids": IDS}, 3, None])
def test_one_batch_is_not_a_series_of_batches(batches):
    with pytest.raises(errors.BatchError, match=r"give a list .* \[batch\] for one"):
        check_iterable(batches)


def test_logits_are_found_in_every_kind_of_output():
    batch = read_batch(Plain(), IDS)
    logits = torch.randn(2, 4, 5)

    class Output:
        def __init__(self):
            self.logits = logits

    for output in (logits, (torch.tensor(0.5), logits), [logits], Output(), {"logits": logits}):
        assert logits_of(output, batch) is logits


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (None, "returned NoneType without logits"),
        ((torch.zeros(2, 4),), "returned tuple without logits"),
        ({"last_hidden_state": torch.zeros(2, 4, 8)}, "returned dict without logits"),
        (torch.zeros(2, 1, 5), r"shape \(2, 1, 5\).* the last token's alone has an argument"),
        (torch.zeros(2, 4, 5, dtype=torch.int64), "floating point logits"),
    ],
)
def test_an_output_without_logits_says_what_it_is(output, match):
    with pytest.raises(errors.NoLogitsError, match=match):
        logits_of(output, read_batch(Plain(), IDS))


def test_other_ids_are_called_in_the_same_way():
    other = torch.arange(12).view(2, 6)
    masked = read_batch(Names(), {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 0]] * 2)})
    call = masked.with_ids(Names(), other)
    assert call.args == ()
    assert set(call.kwargs) == {"input_ids", "attention_mask", "use_cache"}
    assert bool(call.kwargs["attention_mask"].all())
    assert call.counted == 10
    assert torch.equal(read_batch(Plain(), IDS).with_ids(Plain(), other).args[0], other)
    with pytest.raises(errors.BatchError, match=r"Needs\.forward cannot be called"):
        read_batch(Needs(), {"input_ids": IDS, "labels": IDS, "speed": 3}).with_ids(Needs(), other)


def test_quiet_puts_every_modules_own_mode_back_also_on_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with contextlib.suppress(KeyError), quiet(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
