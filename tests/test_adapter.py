"""Adapters: index branches in a folder, and nothing of them in the wrong model."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import msa_compile
from msa_compile import MSAConfig
from msa_compile.adapter import DESCRIPTION, WEIGHTS
from msa_compile.calibrate.metrics import SiteMetrics
from msa_compile.errors import AdapterError, NotSparseError

pytest.importorskip("safetensors")
FIRST_SCHEMA = Path(__file__).parent / "adapters" / "schema_1"
LEARNED = MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned", exclude=["other.*"])
IDS = torch.randint(0, 20, (2, 37), generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width // 2), nn.Linear(width, width // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


class Small(nn.Module):
    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Attention(width) for _ in range(layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def small(**sizes: int) -> Small:
    torch.manual_seed(0)
    model = Small(**sizes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def learned() -> nn.Module:
    model = msa_compile.sparsify(small(), LEARNED, inner="eager", example_inputs=(IDS,))
    torch.manual_seed(1)
    for layer in model.layers:
        for weight in layer.indexer.weights():
            nn.init.normal_(weight, std=0.5)
    model.layers[0].indexer.is_calibrated = True
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS)


def test_a_saved_adapter_gives_another_copy_of_the_base_its_selection(tmp_path):
    model = learned()
    msa_compile.save(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == sorted([DESCRIPTION, WEIGHTS])
    other = msa_compile.sparsify(small(), LEARNED, inner="eager", example_inputs=(IDS,))
    assert not torch.equal(logits(other), logits(model))
    assert msa_compile.load(other, tmp_path / "adapter") is other
    assert torch.equal(logits(other), logits(model))
    assert [layer.indexer.is_calibrated for layer in other.layers] == [True, False]


def test_a_plain_model_is_sparsified_with_the_saved_config():
    model = msa_compile.load(small(), FIRST_SCHEMA, example_inputs=(IDS,))
    report = msa_compile.explain(model)
    assert (report.config, {site.indexer for site in report.sites}) == (LEARNED, {"learned"})


def test_an_adapter_of_the_first_schema_still_loads():
    model = msa_compile.sparsify(small(), LEARNED, inner="eager", example_inputs=(IDS,))
    assert torch.allclose(logits(msa_compile.load(model, FIRST_SCHEMA)), logits(learned()), atol=1e-5)


def test_under_auto_only_calibrated_branches_are_used():
    auto = MSAConfig(block_size=4, topk_blocks=3, dense_below=0)
    model = msa_compile.sparsify(small(), auto, inner="eager", example_inputs=(IDS,))
    msa_compile.load(model, FIRST_SCHEMA)
    logits(model)
    assert [site.indexer for site in msa_compile.explain(model).sites] == ["learned", "keys"]


def test_a_site_that_did_not_pass_its_gate_is_said_to_select_by_keys_from_the_first(tmp_path):
    model = learned()
    msa_compile.save(model, tmp_path)
    said = json.loads((tmp_path / DESCRIPTION).read_text())
    metrics = {field.name: 0.0 for field in dataclasses.fields(SiteMetrics)}
    rejected = {"name": "layers.1", "decision": "keys", "kl_before": 0.0, "metrics": metrics}
    (tmp_path / DESCRIPTION).write_text(json.dumps({**said, "calibration": {"layers.1": rejected}}))
    other = msa_compile.sparsify(small(), LEARNED, inner="eager", example_inputs=(IDS,))
    logits(other)
    rows = msa_compile.explain(msa_compile.load(other, tmp_path)).sites
    assert [row.indexer for row in rows] == ["learned", "keys"]
    assert "did not pass its gate" in rows[1].detail
    logits(other)
    assert [row.indexer for row in msa_compile.explain(other).sites] == ["learned", "keys"]


@pytest.mark.parametrize("taken", [None, nn.Identity(), 3])
def test_a_module_with_an_indexer_of_its_own_keeps_it_and_says_so(taken, caplog):
    model = small()
    model.layers[0].indexer = taken
    msa_compile.sparsify(model, LEARNED, inner="eager", example_inputs=(IDS,))
    assert model.layers[0].indexer is taken
    rows = msa_compile.explain(model).sites
    assert [row.indexer for row in rows] == ["keys", "learned"]
    assert 'named "indexer"' in rows[0].detail
    assert any('named "indexer"' in entry.message for entry in caplog.records)
    msa_compile.unsparsify(model)
    assert model.layers[0].indexer is taken


def test_the_wrong_model_is_refused_and_stays_as_it_was():
    for model, why in ((small(width=32), "other names or shapes"), (small(layers=1), "1 of 2 sites")):
        names = list(model.state_dict())
        with pytest.raises(AdapterError, match=why):
            msa_compile.load(model, FIRST_SCHEMA)
        assert list(model.state_dict()) == names
        with pytest.raises(NotSparseError):
            msa_compile.unsparsify(model)


def damaged(tmp_path: Path, **changes: object) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    said = {**json.loads((FIRST_SCHEMA / DESCRIPTION).read_text()), **changes}
    (folder / DESCRIPTION).write_text(json.dumps(said))
    (folder / WEIGHTS).write_bytes((FIRST_SCHEMA / WEIGHTS).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schema": 99}, "schema 99; this version reads 1"),
        ({"weights": "0"}, "is not the file"),
        ({"config": {"block_size": 0}}, "damaged"),
    ],
)
def test_a_damaged_or_newer_adapter_is_refused(tmp_path, changes, why):
    with pytest.raises(AdapterError, match=why):
        msa_compile.load(small(), damaged(tmp_path, **changes))


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="holds no adapter"):
        msa_compile.load(small(), tmp_path)


def test_a_model_without_branches_has_nothing_to_save(tmp_path):
    model = msa_compile.sparsify(small(), MSAConfig(), inner="eager", example_inputs=(IDS,))
    with pytest.raises(AdapterError, match="no index branch"):
        msa_compile.save(model, tmp_path)
    with pytest.raises(NotSparseError):
        msa_compile.save(small(), tmp_path)


def test_a_save_that_fails_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    model = learned()
    msa_compile.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = copy.deepcopy(model)
    nn.init.zeros_(broken.layers[0].indexer.q_proj.weight)

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        msa_compile.save(broken, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
