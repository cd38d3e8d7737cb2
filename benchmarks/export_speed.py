"""``python -m benchmarks.export_speed``: exported artifacts against what they replace, in turns in one process.

- ``onnx``: prefill in onnxruntime, the sparse export against the dense export of the same model.
- ``package``: prefill and decode of an AOTInductor package with a static cache, against the compiled sparse model.

An artifact is timed where its export found it equal to PyTorch, which every export checks.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import msa_compile
from msa_compile import MSAConfig
from msa_compile.bench.spread import Rounds, take_rounds

RESULTS = Path(__file__).parent / "results"
HEADS, GROUPS, DIM = 8, 2, 64
WIDTH = HEADS * DIM
CONFIG = MSAConfig(block_size=128, topk_blocks=16, dense_below=0)
CPU = torch.device("cpu")


class Layer(nn.Module):
    """One causal attention between its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * GROUPS * DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same."""
        batch, length, _ = x.shape
        parts = self.qkv(x).split([WIDTH, GROUPS * DIM, GROUPS * DIM], -1)
        q, k, v = (part.view(batch, length, -1, DIM).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        made: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return made


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_speed", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=("onnx", "package"), default=["onnx", "package"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--seconds", type=float, default=20, help="for each pair (default 20)")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[str] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        if "onnx" in options.cases:
            rows += _onnx(Path(folder), options.lengths, options.seconds)
        if "package" in options.cases:
            rows += _package(Path(folder), options.lengths, options.seconds)
    text = _markdown(rows)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "export_speed.md").write_text(text)


def _onnx(folder: Path, lengths: list[int], seconds: float) -> list[str]:
    model, most = Layer().eval(), max(lengths)
    given = torch.randn(2, 256, WIDTH)
    dims = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("length", min=1, max=most)}
    dense = torch.onnx.export(model, (given,), dynamo=True, opset_version=23, dynamic_shapes=(dims,), verbose=False)
    assert dense is not None
    dense.save(folder / "dense.onnx")
    msa_compile.sparsify(model, CONFIG, example_inputs=(given,), inner="eager")
    msa_compile.export(model, folder / "sparse.onnx", example_inputs=(given,), max_length=most)
    rows = []
    for length in lengths:
        x = torch.randn(1, length, WIDTH).numpy()
        calls = {name: _session(folder / f"{name}.onnx", x) for name in ("dense", "sparse")}
        rounds = take_rounds(calls, CPU, seconds=seconds)
        rows.append(_row("prefill in onnxruntime", length, rounds, "dense", "sparse"))
        print(rows[-1], flush=True)
    return rows


def _session(path: Path, x: Any) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    session.run(None, {name: x[:, :512]})
    return lambda: session.run(None, {name: x})


def _package(folder: Path, lengths: list[int], seconds: float) -> list[str]:
    import transformers

    most = max(lengths) + 128
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, vocab_size=1024, max_position_embeddings=most,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 1000, (1, most))
    given = {"input_ids": ids[:, :256]}
    msa_compile.sparsify(model, CONFIG)
    path = folder / "static.pt2"
    msa_compile.export(model, path, example_inputs=given, cache="static", max_length=most)
    package = torch._inductor.aoti_load_package(str(path))  # type: ignore[attr-defined]
    rows = []
    for length in lengths:
        cache = transformers.StaticCache(config, most)
        past = [[torch.zeros(1, GROUPS, most, DIM) for _ in range(2)] for _ in range(2)]
        for name, start, end in (("prefill", 0, length), ("decode", length, length + 1)):
            piece = ids[:, start:end].contiguous()
            calls = {
                "compiled": _compiled(model, cache, piece, start),
                "package": _packaged(package, past, piece, start),
            }
            # A second call compiles again: the cache is then there.
            found = [{kind: call() for kind, call in calls.items()} for _ in range(3)][-1]
            gap = float((found["compiled"] - found["package"]).abs().max())
            assert gap < 1e-3, f"{name} at {length}: {gap}"
            rounds = take_rounds(calls, CPU, seconds=seconds / 2, in_a_row=1 if name == "prefill" else 20)
            rows.append(_row(f"{name}, .pt2 with a static cache", length, rounds, "compiled", "package"))
            print(rows[-1], flush=True)
    return rows


def _compiled(model: nn.Module, cache: Any, ids: Tensor, start: int) -> Callable[[], Tensor]:
    where = torch.arange(start, start + ids.shape[1])[None]
    mask = torch.ones(1, start + ids.shape[1], dtype=torch.long)

    def call() -> Tensor:
        for layer in cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(start)
        out = model(ids, attention_mask=mask, position_ids=where, past_key_values=cache, logits_to_keep=1)
        made: Tensor = out.logits
        return made

    return call


def _packaged(package: Callable[..., Any], past: list[list[Tensor]], ids: Tensor, start: int) -> Callable[[], Tensor]:
    def call() -> Tensor:
        made: Tensor = package(ids, torch.tensor([start]), past)[0]
        return made

    return call


def _row(what: str, length: int, rounds: Rounds, before: str, after: str) -> str:
    ratio = rounds.ratio(before, after)
    times = [f"{before} {rounds.of(before).median * 1e3:.2f}", f"{after} {rounds.of(after).median * 1e3:.2f}"]
    return (
        f"| {what} | {length} | {times[0]} | {times[1]} | {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) "
        f"| {ratio.runs} |"
    )


def _markdown(rows: list[str]) -> str:
    return "\n".join(
        [
            "# Exported artifacts against what they replace",
            "",
            f"torch {torch.__version__}, msa_compile {msa_compile.__version__}, {platform.machine()} CPU, "
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, float32, batch 1, {HEADS} heads, {GROUPS} "
            f"groups of width {DIM}, blocks of {CONFIG.block_size}, {CONFIG.topk_blocks} chosen. Times are medians "
            "of calls in turns; the ratio is paired, above 1 where the second is faster, with its quartiles.",
            "Made by `python -m benchmarks.export_speed`. The compiled model makes a mask over its whole static "
            "cache in each call, as `generate` has it; a package has none.",
            "",
            "| what | length | before, ms | after, ms | ratio | rounds |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
