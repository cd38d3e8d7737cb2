"""The quality benchmark: its facts can be known, its selectors choose what they say, and all of it runs at toy size."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.quality import __main__ as command
from benchmarks.quality.judge import Choice
from benchmarks.quality.measure import LayerScore, Row
from benchmarks.quality.selectors import attention_mass, box_bound, choose_blocks, mean_key, newest
from benchmarks.quality.setting import TOY
from benchmarks.quality.subjects import CALIBRATED, DENSE, KEYS, SELECTORS
from benchmarks.quality.tasks import BYTES, practice, questions
from benchmarks.quality.tasks import KEYS as KEY_SYMBOLS
from benchmarks.quality.write import Results, to_markdown
from msa_compile.kernels import select_blocks

TEXT = torch.randint(BYTES, (4000,), generator=torch.Generator().manual_seed(0))


def heads(number: int, seed: int) -> torch.Tensor:
    return torch.randn(2, number, 24, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [practice, lambda *given: questions(*given[:3], 5, given[3])])
def test_every_answer_was_told_before_and_the_text_is_whole(make):
    sequences = make(TEXT, 6, 96, torch.Generator().manual_seed(1))
    for ids, is_text, is_answer in zip(sequences.ids, sequences.is_text, sequences.is_answer, strict=True):
        told = {}
        for place in (~is_text).nonzero()[::2, 0].tolist():
            key, value = ids[place].item(), ids[place + 1].item()
            assert BYTES <= key < BYTES + KEY_SYMBOLS <= value
            assert is_answer[place + 1] == (key in told)
            assert told.setdefault(key, value) == value
        assert is_answer.any()
        assert not (is_answer & is_text).any()
        bytes_left = ids[is_text]
        assert any(torch.equal(bytes_left, window) for window in TEXT.unfold(0, len(bytes_left), 1))


def test_questions_stand_at_the_very_end():
    sequences = questions(TEXT, 6, 96, 5, torch.Generator().manual_seed(1))
    assert sequences.is_answer[:, -10:].tolist() == [[False, True] * 5] * 6
    assert sequences.is_answer.sum() == 30


@pytest.mark.parametrize("topk", [1, 3, 6])
def test_blocks_are_chosen_as_the_op_chooses_them(topk):
    query, key = heads(2, 0), heads(2, 1)
    scores = query @ key.transpose(-1, -2)
    visible = torch.ones(24, 24, dtype=torch.bool).tril()
    of_blocks = scores.masked_fill(~visible, -torch.inf).unflatten(-1, (6, 4)).amax(-1)
    expected = select_blocks(query, key, block_size=4, topk=topk)
    assert torch.equal(choose_blocks(of_blocks, 4, topk), expected)
    rows = torch.tensor([3, 4, 17])
    assert torch.equal(choose_blocks(of_blocks[:, :, rows], 4, topk, rows), expected[:, :, rows])


def test_attention_mass_is_what_softmax_gives_a_block():
    query, key = heads(4, 0), heads(2, 1)
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    weights = logits.masked_fill(torch.ones(24, 24, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    expected = weights.unflatten(1, (2, 2)).mean(2).unflatten(-1, (6, 4)).sum(-1)
    torch.testing.assert_close(attention_mass(query, key, 4), expected)


def test_a_box_bounds_the_best_score_and_a_mean_is_below_it():
    query, key = heads(2, 0), heads(2, 1)
    best = (query @ key.transpose(-1, -2)).unflatten(-1, (6, 4)).amax(-1)
    assert (box_bound(query, key, 4) >= best - 1e-5).all()
    assert (mean_key(query, key, 4) <= best + 1e-5).all()


def test_a_window_is_the_first_block_and_the_newest():
    ids = choose_blocks(newest(heads(4, 0), heads(2, 1), 4), 4, 3)
    assert ids[0, 0, 23].tolist() == [0, 4, 5]
    assert ids[0, 0, 5].tolist() == [0, 1, -1]


def test_recall_leaves_the_own_block_out():
    mass = torch.tensor([[[[0.4, 0.1, 0.3, 0.2]]]])
    ids, best = torch.tensor([[[[1, 2, 3]]]]), torch.tensor([[[[0, 2, 3]]]])
    choice = Choice(ids, best, mass, torch.tensor([15]), 0.0)
    assert choice.recall() == 0.5
    assert choice.captured(ids) == pytest.approx(0.6)


def row(selector: str, share: int, perplexity: float, retrieval: float) -> Row:
    layers = (LayerScore(0.5, 0.8, 0.7, 0.2),) if share > 1 else ()
    return Row(0, selector, share, perplexity, retrieval, retrieval, layers)


def test_the_report_says_where_the_goal_is_missed():
    rows = [row(DENSE, 1, 4.0, 1.0)]
    rows += [row(KEYS, share, 4.01, 1.0) for share in (8, 16)]
    rows += [row(CALIBRATED, 8, 4.02, 1.0), row(CALIBRATED, 16, 4.2, 0.97)]
    machine = dict.fromkeys(("processor", "torch", "msa_compile", "day"), "x")
    text = to_markdown(Results(tuple(rows), machine, 1), [], TOY, [])
    assert "Perplexity within 1% of dense: no (in 0 of 1 seeds); worst seed +5.00%" in text
    assert "Retrieval not below `keys`: no (in 0 of 1 seeds); worst seed -3.0 points" in text
    assert f"`{CALIBRATED}` keeps perplexity and retrieval in every seed down to 1/8 of the keys" in text
    assert f"`{KEYS}` keeps perplexity and retrieval in every seed down to 1/16 of the keys." in text


def test_all_of_it_runs_at_toy_size_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "TOY", replace(TOY, shares=(8,)))
    run = ["--toy", "--keep", str(tmp_path)]
    assert command.main([*run, "--stop-after", "0"]) == command.UNFINISHED
    kept = replace(row(DENSE, 1, 4.0, 1.0), needles=0.25)
    folder = tmp_path / f"rows-{TOY.of_rows(has_indexers=False)}-0"
    folder.mkdir()
    (folder / "dense-1.json").write_text(json.dumps(kept.to_dict()))
    assert command.main(run) == 0
    out = tmp_path / "toy"
    rows = [Row.from_dict(one) for one in json.loads((out / "quality.json").read_text())["rows"]]
    assert [one.selector for one in rows] == [DENSE, *SELECTORS]
    assert rows[0] == kept, "a finished row is read"
    oracle = rows[1 + SELECTORS.index("oracle")]
    assert oracle.mean("block_recall") == 1
    for one in rows[1:]:
        for layer, of_oracle in zip(one.layers, oracle.layers, strict=True):
            assert layer.mass <= layer.oracle_mass + 1e-6
            assert layer.oracle_mass == pytest.approx(of_oracle.mass, abs=1e-6), "judged on the dense model's states"
    names = {"quality.json", "quality.md", "quality.png", "quality_maps.png"}
    assert {path.name for path in out.iterdir()} == names
