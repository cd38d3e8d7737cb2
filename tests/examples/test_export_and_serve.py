"""The example of serving runs, small: the same tokens from onnxruntime alone as from PyTorch."""

import re

import pytest
import torch

pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("transformers", reason="the example needs the hf extra")
pytest.importorskip("tqdm", reason="the example needs the viz extra")

from examples import export_and_serve


def test_the_example_serves_the_same_tokens_and_keeps_the_file(tmp_path, capfd):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path / "model.onnx"
    small = ["--inner", "eager", "--prompt", "200", "--new", "12", "--steps", "3", "--calibrate", "2", "--hidden", "64"]
    assert export_and_serve.main([*small, "--out", str(path)]) == 0
    torch.set_num_threads(threads)
    printed = capfd.readouterr()
    assert "the 12 tokens of PyTorch and onnxruntime are the same" in printed.out
    assert "past_key_values.1.index_key" in printed.out, "a calibrated layer has its index keys beside its cache"
    assert re.search(r"PyTorch [\d.]+, onnxruntime [\d.]+$", printed.out, re.MULTILINE)
    assert "in-place optimization not activated" not in printed.err, "a step copied the cache"
    assert path.exists()
