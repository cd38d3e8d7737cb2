"""``python -m msa_compile.bench``: which model, which layers, the gate, the numbers' shape. No time is asserted."""

import copy
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from msa_compile.bench import model as model_module
from msa_compile.bench import subject as subject_module
from msa_compile.bench.__main__ import main, parse, parse_lengths, to_request
from msa_compile.bench.amdahl import attention_flops, ceiling, other_flops_per_token
from msa_compile.bench.model import _gate, compile_times, first_calls, run_model, to_arguments
from msa_compile.bench.result import Compiling, Request
from msa_compile.bench.subject import SHAPES, build_subject, choose_layers
from msa_compile.errors import BenchArgumentError, UnknownModelError

CPU = torch.device("cpu")
TINY = Request("tiny", (64, 128), inner="eager", block_size=16, topk=2, dense_below=0, new_tokens=3, seconds=0.05)
FLAGS = ["--inner", "eager", "--block-size", "16", "--topk", "2", "--new", "3", "--seconds", "0.05", "--threads", "1"]


@pytest.fixture
def config_file(tmp_path):
    transformers = pytest.importorskip("transformers", reason="a config file needs the hf extra")
    config = transformers.Qwen3Config(
        vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_a_config_is_measured_and_printed(config_file, tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = [str(config_file), "--layers", "2", "--lengths", "64,128", *FLAGS, "--no-compile-times"]
    assert main([*arguments, "--dense-below", "0", "--json", str(out)]) == 0
    printed = capsys.readouterr()
    assert "building" in printed.err
    assert "2 of 3 layers" in printed.out
    assert "vocabulary cut to 4096" in printed.out
    assert "gate green" in printed.out
    assert "2 sparse and 0 dense sites; calls that ran dense around the model: 0" in printed.out
    for what in ("time to first token", "tokens per second", "peak memory above weights"):
        assert len(re.findall(rf"^ *(?:64|128) +{what} ", printed.out, re.MULTILINE)) == 2
    kept = json.loads(out.read_text())
    assert [entry["length"] for entry in kept["lengths"]] == [64, 128]
    assert kept["lengths"][0]["first_token"].keys() == {"dense", "sparse"}
    assert 0 < kept["lengths"][0]["shares"]["prefill_flops"] < kept["lengths"][1]["shares"]["prefill_flops"] < 1


def test_a_built_in_shape_runs_without_transformers(monkeypatch):
    def absent(name):
        raise ImportError("no transformers here")

    monkeypatch.setattr(subject_module, "hub_config", absent)
    result = run_model(replace(TINY, lengths=(64,), has_compile_times=False), say=lambda text: None)
    assert result.is_green
    assert (result.sparse_sites, result.dense_sites, result.dense_calls) == (2, 0, 0)
    assert result.dense_below == ("calls with at most 0 keys run dense (given)",)
    with pytest.raises(UnknownModelError, match=r"need transformers: pip install msa_compile\[hf\]"):
        run_model(replace(TINY, model="some/name"), say=lambda text: None)


def test_index_branches_are_timed_and_said_to_be_untrained(capsys):
    assert (
        main(["tiny", "--lengths", "64", *FLAGS, "--dense-below", "0", "--indexer", "learned", "--no-compile-times"])
        == 0
    )
    said = "2 sites with an index branch that is not trained"
    assert re.search(f"{said}.*; selections without index keys: 0", capsys.readouterr().out)


def test_a_selection_without_index_keys_turns_the_gate_red(monkeypatch):
    subject = build_subject("tiny", None, torch.float32, CPU)

    def copied(token, given, result):
        cache = [(k.clone(), v.clone()) for k, v in given["cache"]]
        return {**subject.after(token, given, result), "cache": cache}

    with torch.no_grad():
        said = _gate(replace(subject, after=copied), replace(TINY, indexer="learned"))
    assert said == "RED: 2 selections of a learned indexer found no index keys"


def test_a_red_gate_prints_no_numbers(monkeypatch, capsys):
    monkeypatch.setitem(model_module._TOLERANCE, torch.float32, -1.0)
    assert main(["tiny", "--lengths", "64", *FLAGS]) == 1
    printed = capsys.readouterr().out
    assert "gate RED" in printed
    assert "time to first token" not in printed
    assert "x [" not in printed


def test_the_gate_sees_a_sparse_model_that_computes_something_else(monkeypatch):
    def other_weights(subject):
        twin = copy.deepcopy(subject.model)
        twin.layers[0].attention.v.weight.data *= 1.1
        return twin

    monkeypatch.setattr(subject_module.Subject, "twin", other_weights)
    with torch.no_grad():
        assert "RED: with all blocks the logits differ" in _gate(build_subject("tiny", None, torch.float32, CPU), TINY)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--lengths", "64,many"], "whole numbers with commas"),
        (["tiny", "--lengths", "1"], "whole numbers from 2"),
        (["tiny", "--layers", "3"], "3 layers are asked for, and the model has 2"),
        (["tiny", "--layers", "0"], "whole numbers from 1"),
        (["tiny", "--threads", "0"], "threads is 0"),
        (["no-such-folder/config.json", "--lengths", "64"], "is no built-in shape"),
    ],
)
def test_a_mistake_is_said_in_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ")
    assert said in printed.err
    assert printed.out == ""


def test_layers_are_cut_only_where_the_whole_does_not_fit(monkeypatch):
    monkeypatch.setattr(subject_module, "available_bytes", lambda device: 2 * 350)
    assert choose_layers(36, None, lambda n: 100 * n, CPU) == 3
    assert choose_layers(3, None, lambda n: 100 * n, CPU) == 3
    assert choose_layers(36, 2, lambda n: 100 * n, CPU) == 2
    with pytest.raises(BenchArgumentError, match="ask for fewer layers"):
        choose_layers(36, None, lambda n: 400 * n, CPU)
    with pytest.raises(BenchArgumentError, match="5 layer"):
        choose_layers(36, 5, lambda n: 100 * n, CPU)


def test_built_in_shapes_are_the_published_ones():
    heads = {name: (shape.query_heads, shape.key_value_heads, shape.head_dim) for name, shape in SHAPES.items()}
    assert heads["qwen3-8b"] == (32, 8, 128)
    assert heads["llama-3.1-70b"] == (64, 8, 128)
    assert heads["minimax-m3"] == (64, 4, 128)


def test_a_twin_shares_its_weights():
    subject = build_subject("tiny", 1, torch.float32, CPU)
    twin = subject.twin()
    assert twin is not subject.model
    assert all(a is b for a, b in zip(twin.parameters(), subject.model.parameters(), strict=True))


def test_steps_continue_what_a_prefill_began():
    subject = build_subject("tiny", None, torch.float32, CPU)
    ids = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = subject.logits(subject.model(**subject.first(ids, 0)))
        given = subject.first(ids[:, :39], 1)
        result = subject.model(**given)
        torch.testing.assert_close(subject.logits(subject.model(**subject.after(ids[:, 39:], given, result))), whole)


def test_flops_besides_attention_are_those_of_the_projections():
    subject = build_subject("tiny", None, torch.float32, CPU)
    weights = sum(p.numel() for name, p in subject.model.layers.named_parameters() if p.dim() == 2)
    with torch.no_grad():
        found = other_flops_per_token(lambda n: subject.model(**subject.first(torch.zeros(1, n, dtype=torch.long), 0)))
    assert found == pytest.approx(2 * weights)


def test_the_ceiling_is_amdahls():
    assert ceiling(0.75) == 4
    assert ceiling(1) == float("inf")
    assert attention_flops([], 100) == 0


def test_a_request_is_its_command_line():
    for request in (TINY, replace(TINY, dense_below="auto", layers=1, dtype=torch.bfloat16, indexer="learned")):
        assert to_request(parse(to_arguments(request))) == request
    assert parse_lengths("8192,32768") == (8192, 32768)


def test_a_process_that_fails_leaves_compile_times_out(monkeypatch):
    said = []
    failed = SimpleNamespace(returncode=3, stdout="")
    monkeypatch.setattr(model_module.subprocess, "run", lambda command, **options: failed)
    assert compile_times(TINY, "sparse", said.append) is None
    assert "ended with 3" in said[-1]


def test_compile_times_are_those_of_two_processes_with_one_cache(monkeypatch):
    folders = []

    def answer(command, env, **options):
        folders.append(env["TORCHINDUCTOR_CACHE_DIR"])
        assert command[1:3] == ["-m", "msa_compile.bench"]
        assert command[-2:] == ["--first-calls", "dense"]
        return SimpleNamespace(returncode=0, stdout=f"noise\n{10.0 / len(folders)}\n")

    monkeypatch.setattr(model_module.subprocess, "run", answer)
    assert compile_times(TINY, "dense", lambda text: None) == Compiling(cold=10.0, warm=5.0)
    assert folders[0] == folders[1]


def test_first_calls_are_timed_for_each_of_the_two():
    assert first_calls(replace(TINY, lengths=(64,)), "sparse") >= 0
