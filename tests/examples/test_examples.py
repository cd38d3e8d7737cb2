"""Every example runs, small, and what it prints is checked."""

import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the demo needs the hf extra")
pyplot = pytest.importorskip("matplotlib.pyplot", reason="the demo needs the viz extra")

from examples import as_backend, calibrate_and_generate, demo, hand_written  # noqa: E402

SMALL = ("--inner", "eager", "--threads", "1", "--context", "128", "--block-size", "16", "--windows", "2")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _perplexities(printed: str) -> dict[str, tuple[float, float]]:
    """Share of keys read (percent) and perplexity, by the name of the row."""
    rows = re.findall(r"^(dense|\d+ blocks of \d+) +([\d.]+)% +([\d.]+) ", printed, re.MULTILINE)
    return {name: (float(share), float(perplexity)) for name, share, perplexity in rows}


def _check_picture(path: Path) -> None:
    picture = pyplot.imread(path)
    assert picture.shape[0] > 300
    assert picture.shape[1] > 300
    colours = {tuple(round(float(part) * 255) for part in pixel[:3]) for pixel in picture.reshape(-1, picture.shape[2])}
    assert {(0x2F, 0x6D, 0xB5), (0xF2, 0x8E, 0x2B), (0xE3, 0xE6, 0xEA)} <= colours  # selected, local, left out


def test_demo_trains_compares_and_draws(tmp_path, capsys):
    out = tmp_path / "made" / "blocks.png"
    assert demo.main(["--small", *SMALL, "--topk", "2", "8", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = _perplexities(printed)
    assert list(rows) == ["dense", "8 blocks of 16", "2 blocks of 16"]
    assert 1 < rows["dense"][1] < 256, "a model that has learned beats a uniform guess"
    assert rows["8 blocks of 16"] == pytest.approx(rows["dense"], abs=1e-3), "eight blocks of 16 are all of 128 keys"
    # Of 128 * 129 / 2 keys: a block of 16 and its past half (8.5) for 112 queries, the past alone for the first 16.
    assert rows["2 blocks of 16"][0] == pytest.approx(100 * (128 * 8.5 + 112 * 16) / (128 * 129 / 2), abs=0.05)
    assert rows["2 blocks of 16"][1] != rows["dense"][1]
    assert "although the model is sparsified: 0" in printed
    assert "2 sparse and 0 dense rows" in printed
    assert "calibrated in 4 steps" in printed
    assert float(re.search(r"^calibrated, perplexity on the same windows: (\S+)$", printed, re.MULTILINE)[1]) > 1
    assert re.search(r"the first \d+ of \d+ tokens are the same", printed)
    assert str(out) in printed
    number = r"[\d.e+]+ ms"
    times = rf"dense {number}, sparse {number} \([\d.]+x (?:faster|slower)\)"
    assert re.search(rf"^one layer, .* 512 tokens: prefill {times}; one new token {times}$", printed, re.MULTILINE)
    _check_picture(out)


@pytest.fixture
def saved_model(tmp_path) -> Path:
    """A model and its tokenizer in a folder, as on the hub; weights are random."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path / "model"
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_demo_takes_a_saved_model_and_a_text(saved_model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("What is sparse is read in blocks; what is dense is read in full.\n" * 20)
    out = tmp_path / "blocks.png"
    arguments = ["--model", str(saved_model), "--text", str(text), *SMALL, "--topk", "8", "--out", str(out)]
    assert demo.main(arguments) == 0
    rows = _perplexities(capsys.readouterr().out)
    assert rows["8 blocks of 16"] == pytest.approx(rows["dense"], abs=2e-3)
    _check_picture(out)


def test_demo_says_what_to_do_without_the_hub(monkeypatch, tmp_path, capsys):
    # transformers reads its offline switch once, at import; a folder that is not there takes the same way out.
    missing = tmp_path / "no-such-model"
    assert demo.main(["--model", str(missing), "--out", str(tmp_path / "blocks.png")]) == 2
    errors = capsys.readouterr().err
    assert "cannot load the model" in errors
    assert "has to be reachable" in errors


def test_hand_written_model_is_made_sparse(capsys):
    assert hand_written.main(["--inner", "eager", "--new", "20"]) == 0
    printed = capsys.readouterr().out
    assert "2 sparse and 0 dense rows in 1 graph(s)" in printed
    difference = float(re.search(r"differ from dense by (\S+) at most", printed)[1])
    assert difference < 1e-4
    dense, sparse = (re.search(rf"^{name}: +\[(.*)\]$", printed, re.MULTILINE)[1] for name in ("dense", "sparse"))
    assert len(dense.split(",")) == len(sparse.split(",")) == 20
    assert "although the model is sparsified: 0" in printed


def test_branches_are_calibrated_and_generate(tmp_path, capsys):
    plot = tmp_path / "calibration.png"
    arguments = [
        "--small",
        "--inner",
        "eager",
        "--context",
        "128",
        "--topk",
        "2",
        "--min-mass-ratio",
        "0",
        "--min-found",
        "0",
    ]
    assert calibrate_and_generate.main([*arguments, "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 sites select by their index branch" in printed
    assert "dense calls: 0, selections without index keys: 0" in printed
    assert "another copy of the base has the same decisions: True" in printed
    assert pyplot.imread(plot).shape[0] > 300


def test_backend_and_function_agree(capsys):
    assert as_backend.main(["--inner", "eager"]) == 0
    printed = capsys.readouterr().out
    assert "the first query that differs from dense is number 64" in printed
