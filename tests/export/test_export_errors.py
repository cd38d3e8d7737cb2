"""What cannot be exported says so, and leaves no file."""

import errno
import importlib.util
import resource

import pytest
import torch

import msa_compile
from msa_compile.errors import (
    CaptureError,
    ExampleInputsError,
    ExportFormatError,
    ExportIndexerError,
    ExportMismatchError,
    ExportNotSparseError,
    ExportWriteError,
    MissingPackageError,
    NotSparseError,
)

pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")
from exported import sparse, tokens
from models.zoo import ZOO

from msa_compile.export import compare, export_model, write_aoti
from msa_compile.passes import plan_index
from msa_compile.passes.placed import IndexRefused


@pytest.fixture(scope="module")
def model():
    return sparse(ZOO["nanogpt"].build(), (tokens(2, 23),))


@pytest.fixture
def export(model, tmp_path):
    """Exports, and checks that an error leaves what was there."""
    old = tmp_path / "m.onnx"
    old.write_text("an older artifact")

    def run(name="m.onnx", **given):
        return msa_compile.export(
            model, tmp_path / name, **{"example_inputs": (tokens(2, 23),), "max_length": 64} | given
        )

    yield run
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert old.read_text() == "an older artifact"


def test_a_model_that_is_not_sparsified_is_refused(tmp_path):
    with pytest.raises(NotSparseError, match="sparsify"):
        msa_compile.export(ZOO["nanogpt"].build(), tmp_path / "m.onnx", example_inputs=tokens(1, 9))


@pytest.mark.parametrize("field", ["index_scores", "index_cache"])
def test_scores_and_index_keys_that_no_artifact_has_are_refused(field, tmp_path):
    inputs = (tokens(2, 23),)
    model = sparse(ZOO["nanogpt"].build(), inputs, **{field: "fp8"})
    with pytest.raises(ExportIndexerError, match=f'{field}="exact"'):
        msa_compile.export(model, tmp_path / "m.onnx", example_inputs=inputs, max_length=64)


def test_an_unknown_suffix_and_an_unknown_cache_name_what_there_is(export):
    with pytest.raises(ExportFormatError, match=r"m\.plan.*\.onnx"):
        export("m.plan")
    with pytest.raises(ExportFormatError, match="'none', 'static', 'explicit'"):
        export(cache="paged")


def test_a_missing_package_is_named_with_the_extra_that_brings_it(export, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        export_model.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name)
    )
    with pytest.raises(MissingPackageError, match=r"needs onnxscript: pip install 'msa_compile\[onnx\]'"):
        export()


def test_shapes_outside_their_range_are_refused(export):
    with pytest.raises(ExampleInputsError, match="length is 23 in the example inputs; its range is 1 to 16"):
        export(max_length=16)
    with pytest.raises(ExampleInputsError, match="give max_length"):
        export(max_length=None)


def test_a_range_that_the_model_cannot_hold_is_refused(export):
    one = torch.export.Dim("one", min=1, max=64)
    with pytest.raises(CaptureError, match=r"torch\.export could not capture"):
        export(dynamic_shapes=({0: one, 1: one},))


def test_an_example_of_one_row_is_refused_where_nothing_says_how_to_repeat_it(export):
    with pytest.raises(ExampleInputsError, match="two rows and two tokens at least"):
        export(example_inputs=(tokens(1, 23),))


def test_a_disk_that_is_full_in_the_middle_of_a_file_leaves_nothing(export):
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, allowed[1]))
    try:
        with pytest.raises(ExportWriteError, match=r"File too large.*free space or choose another folder"):
            export()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)


def test_a_disk_that_is_full_leaves_nothing_of_a_package(export, monkeypatch):
    def half(program, path, functions, library, folder):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write_aoti, "build_package_ops", lambda: None)
    monkeypatch.setattr(write_aoti._compat, "compile_package", half)
    with pytest.raises(ExportWriteError, match="No space left on device"):
        export("m.pt2")


def test_a_folder_that_is_not_there_is_an_error(export):
    with pytest.raises(ExportWriteError, match="Give the path of a folder that exists"):
        export("nowhere/m.onnx")


def test_a_file_that_computes_something_else_is_not_left(export, monkeypatch):
    monkeypatch.setattr(compare, "TOLERANCES", {"float32": 0.0})
    with pytest.raises(ExportMismatchError, match=r"apart between onnxruntime .* and PyTorch"):
        export()


def test_a_file_that_was_compared_nowhere_is_not_left(export, monkeypatch):
    monkeypatch.setattr(compare, "samples", lambda *_: ([], ("length 3: the model does not take it",)))
    with pytest.raises(
        ExportMismatchError, match=r"nothing could be compared .*: length 3: the model does not take it"
    ):
        export()


def test_a_model_that_keeps_its_cache_to_itself_is_refused(tmp_path):
    model = ZOO["gpt_fast"].build()
    model.setup_caches(2)
    given = (tokens(2, 23), torch.arange(23))
    sparse(model, given)
    batch_is_kept = (None, {0: torch.export.Dim("length", min=1, max=64)})
    with pytest.raises(CaptureError, match=r"writes into tensors that it keeps|could not capture"):
        msa_compile.export(model, tmp_path / "m.onnx", example_inputs=given, dynamic_shapes=batch_is_kept)
    assert list(tmp_path.iterdir()) == []


def test_a_site_that_is_lost_between_model_and_program_is_an_error(model, tmp_path, monkeypatch):
    lost = msa_compile.explain(model).sites[0].name
    monkeypatch.setattr(msa_compile.MSAConfig, "matches", lambda self, name: name != lost)
    with pytest.raises(ExportNotSparseError, match="would be dense in the artifact"):
        msa_compile.export(model, tmp_path / "m.onnx", example_inputs=tokens(2, 23), max_length=64)


def test_a_learned_indexer_that_cannot_be_captured_is_not_replaced_by_keys(tmp_path, monkeypatch):
    config = msa_compile.MSAConfig(block_size=4, topk_blocks=3, indexer="learned")
    model = msa_compile.sparsify(ZOO["llama"].build(), config, inner="eager")

    def refuse(*given, **options):
        raise IndexRefused("its hidden state is not found")

    monkeypatch.setattr(plan_index, "plan_index", refuse)
    with pytest.raises(ExportIndexerError, match=r'layers\.0\.self_attn: .*not found[^$]*indexer="keys"'):
        msa_compile.export(model, tmp_path / "m.onnx", example_inputs=tokens(2, 23))
    assert list(tmp_path.iterdir()) == []
