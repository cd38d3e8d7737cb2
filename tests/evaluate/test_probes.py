"""Probes hide what they say, ask for it, and tell a model that retrieves from one that does not."""

import itertools

import pytest
import torch
from runtime.tiny import VOCAB as TINY_VOCAB
from runtime.tiny import llama
from torch import nn
from torch.nn import functional as F

import msa_compile
from msa_compile import MSAConfig, errors
from msa_compile.evaluate.probes import KEY, MANY, PROBES, VALUE, ProbePlan, build_prompts, check_plan
from msa_compile.evaluate.result import ProbeResult

VOCAB, LENGTH = 400, 192
TEXT = torch.arange(VOCAB // 2, VOCAB).repeat(4)
PLAN = ProbePlan((LENGTH,), samples=6)


class Retriever(nn.Module):
    """One attention layer, by hand: each token looks for what came after the same token before."""

    heads, groups = 4, 2

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        codes = F.normalize(torch.randn(VOCAB, 64, generator=generator), dim=1)
        self.embed = nn.Embedding.from_pretrained(codes)
        self.q = nn.Linear(128, self.heads * 64, bias=False)
        self.k = nn.Linear(128, self.groups * 64, bias=False)
        self.v = nn.Linear(128, self.groups * 64, bias=False)
        self.head = nn.Linear(self.heads * 64, VOCAB, bias=False)
        now, before = torch.eye(128)[:64], torch.eye(128)[64:]
        with torch.no_grad():
            self.q.weight.copy_(480 * now.repeat(self.heads, 1))
            self.k.weight.copy_(before.repeat(self.groups, 1))
            self.v.weight.copy_(now.repeat(self.groups, 1))
            self.head.weight.copy_(codes.repeat(1, self.heads))

    def forward(self, ids):
        x = self.embed(ids)
        x = torch.cat([x, F.pad(x, (0, 0, 1, 0))[:, :-1]], -1)
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, 64).transpose(1, 2)
        k = self.k(x).view(batch, length, self.groups, 64).transpose(1, 2)
        v = self.v(x).view(batch, length, self.groups, 64).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.head(y.transpose(1, 2).reshape(batch, length, -1))


def evaluated(topk, model=None):
    model, vocabulary = (Retriever().eval(), VOCAB) if model is None else (model, TINY_VOCAB)
    config = MSAConfig(block_size=8, topk_blocks=topk, dense_below=0)
    batch = (torch.arange(VOCAB) % vocabulary).view(2, VOCAB // 2)
    msa_compile.sparsify(model, config, example_inputs=(batch,), inner="eager")
    found = msa_compile.evaluate(model, [batch], probe_lengths=[LENGTH], probe_samples=6, progress=False)
    return {probe.name: probe for probe in found.probes}, str(found)


def test_what_dense_retrieves_is_found_with_two_blocks_and_lost_with_one():
    found, _ = evaluated(2)
    for name in ("needle", "multi-key"):
        probe = found[name]
        assert (probe.length, probe.answers) == (LENGTH, 6 * VALUE)
        assert probe.dense == probe.sparse == probe.kept == 1.0, name
        assert probe.is_informative
    lost, text = evaluated(1)
    for name in ("needle", "multi-key"):
        assert lost[name].dense == 1.0
        assert lost[name].sparse < 0.4, "only the local block is read, and the needle is rarely there"
        assert lost[name].kept == lost[name].sparse
    assert "needle is at chance" not in text


def test_an_untrained_model_is_said_to_be_at_chance():
    found, text = evaluated(2, llama())
    assert set(found) == set(PROBES)
    assert not any(probe.is_informative for probe in found.values())
    assert text.count("dense is at chance: says nothing of sparse") == len(PROBES)
    assert found["needle"].chance == 1 / TINY_VOCAB


def test_chance_is_told_from_retrieval_by_how_many_answers_there_are():
    def probe(dense, answers):
        return ProbeResult("needle", 64, answers, dense, 0.0, None, 0.1)

    assert not probe(0.2, 32).is_informative
    assert probe(0.3, 32).is_informative
    assert probe(0.2, 320).is_informative


@pytest.mark.parametrize("name", PROBES)
def test_prompts_hold_what_is_asked_for_once_and_before(name):
    prompts, asked = build_prompts(name, LENGTH, TEXT, PLAN)
    assert prompts.shape == asked.shape == (6, LENGTH)
    hops = MANY if name == "variable-tracking" else 1
    assert asked.sum(1).tolist() == [(hops - 1) * KEY + VALUE] * 6
    for row, wanted in zip(prompts.tolist(), asked.tolist(), strict=True):
        runs = [list(run) for is_asked, run in itertools.groupby(range(LENGTH), wanted.__getitem__) if is_asked]
        assert len(runs) == hops
        assert runs[-1][-1] == LENGTH - 1
        for run in runs:
            piece = row[run[0] - KEY : run[-1] + 1]
            places = [t for t in range(LENGTH - len(piece) + 1) if row[t : t + len(piece)] == piece]
            assert len(places) == 2, "hidden once, and asked for once"
            assert places[0] + len(piece) <= runs[0][0]


def test_keys_of_the_multi_key_probe_differ_in_their_last_token_only():
    prompts, _ = build_prompts("multi-key", LENGTH, TEXT, PLAN)
    for row in prompts.tolist():
        same = row[LENGTH - KEY - VALUE : LENGTH - VALUE - 1]
        places = [t for t in range(LENGTH) if row[t : t + KEY - 1] == same]
        assert len(places) == MANY + 1
        assert len({row[t + KEY - 1] for t in places}) == MANY


def test_needles_lie_everywhere_and_the_seed_decides_where():
    many = ProbePlan((LENGTH,), samples=40)
    prompts, _ = build_prompts("needle", LENGTH, TEXT, many)
    rows = [(row, row[-KEY - VALUE : -VALUE]) for row in prompts.tolist()]
    depths = [next(t for t in range(LENGTH) if row[t : t + KEY] == key) for row, key in rows]
    assert min(depths) < LENGTH // 4
    assert max(depths) > LENGTH // 2
    again, _ = build_prompts("needle", LENGTH, TEXT, many)
    other, _ = build_prompts("needle", LENGTH, TEXT, ProbePlan((LENGTH,), samples=40, seed=1))
    assert torch.equal(prompts, again)
    assert not torch.equal(prompts, other)


def test_around_stands_the_users_own_text_repeated_where_it_is_short():
    short = torch.arange(300, 350)
    prompts, _ = build_prompts("needle", LENGTH, short, PLAN)
    assert set(prompts.unique().tolist()) <= set(short.tolist())
    row = prompts[0].tolist()
    assert sum(later == earlier + 1 for earlier, later in itertools.pairwise(row)) > LENGTH // 2


class Letters:
    """A tokenizer of bytes that puts something in front unless it is told not to."""

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + list(text.encode())


@pytest.mark.parametrize("name", PROBES)
def test_sentences_ask_for_the_number_or_the_name_that_was_hidden(name):
    plan = ProbePlan((400,), samples=3, tokenizer=Letters())
    prompts, asked = build_prompts(name, 400, torch.full((999,), ord("~")), check_plan(plan))
    for row, wanted in zip(prompts, asked, strict=True):
        text = bytes(row.tolist()).decode()
        answers = bytes(row[wanted].tolist()).decode().split()
        hidden = text[: text.rindex("~")]
        assert "\x01" not in text
        assert len(answers) == (MANY if name == "variable-tracking" else 1)
        assert answers[-1].isdigit()
        assert all(answer in hidden for answer in answers)
        assert hidden.count("The number of") + hidden.count("VAR") == (1 if name == "needle" else MANY)


def test_a_tokenizer_that_gives_no_ids_is_refused():
    class Words:
        def encode(self, text):
            return text.split()

    with pytest.raises(errors.EvaluateArgumentError, match="gives no list of token ids"):
        check_plan(ProbePlan((400,), tokenizer=Words()))
