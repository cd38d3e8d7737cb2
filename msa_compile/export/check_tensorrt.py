"""One command for a machine with TensorRT: are the engines right there, and how fast?

    python -m msa_compile.export.check_tensorrt              # builds, runs, compares, prints a table
    python -m msa_compile.export.check_tensorrt --dry-run    # as far as it goes without TensorRT and without a GPU

A small decoder, written here, is exported as a prompt and as a step behind a cache, with plugins that call Python and
with plugins that are PTX, in each dtype. `write_engine` compares every engine with PyTorch before it counts. Exits with
1 if a row fails, and with 2 where engines cannot be built. Everything but `--dry-run` is not yet run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from msa_compile.config import MSAConfig
from msa_compile.errors import MissingPackageError, MSAError
from msa_compile.export.capture import Call, capture
from msa_compile.export.engine.ahead_of_time import compile_launches
from msa_compile.export.engine.require import require_tensorrt
from msa_compile.export.engine.write_engine import prepare, write_engine
from msa_compile.export.records import SparseProgram
from msa_compile.kernels.chip import CHIPS, chip_of
from msa_compile.table import to_table

_VOCABULARY, _WIDTH, _LAYERS, _HEADS, _GROUPS = 512, 1024, 2, 8, 2
_DIM = _WIDTH // _HEADS
_CONFIG = MSAConfig(block_size=128, topk_blocks=4, dense_below=0)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_COLUMNS = ("call", "plugins", "dtype", "result", "build s", "MiB", "TensorRT ms", "PyTorch ms")


class _Layer(nn.Module):
    """Attention with grouped queries and rotary positions behind a cache that grows, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(_WIDTH), nn.RMSNorm(_WIDTH)
        self.query, self.out = nn.Linear(_WIDTH, _WIDTH, bias=False), nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.key, self.value = (nn.Linear(_WIDTH, _GROUPS * _DIM, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(_WIDTH, 2 * _WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * _WIDTH, _WIDTH, bias=False)

    def forward(self, x: Tensor, angle: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` ``[B, T, C]``, ``angle`` ``[T, D/2]``, ``past`` keys and values; returns ``x``, keys and values."""
        batch, length, _ = x.shape
        heads = self.norm1(x)
        q, k, v = (
            layer(heads).view(batch, length, -1, _DIM).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        q, k = _rotated(q, angle), _rotated(k, angle)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        total = k.shape[2]
        seen = torch.arange(total, device=x.device) <= torch.arange(total - length, total, device=x.device)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, _WIDTH))
        heads = self.norm2(x)
        return x + self.down(F.silu(self.gate(heads)) * self.up(heads)), k, v


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., : _DIM // 2], x[..., _DIM // 2 :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Decoder(nn.Module):
    """A decoder whose cache goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(_VOCABULARY, _WIDTH), nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))

    def forward(self, ids: Tensor, past: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Logits ``[B, T, V]`` of tokens ``[B, T]``, and the keys and values of each layer."""
        before = past[0][0].shape[2]
        place = torch.arange(before, before + ids.shape[1], device=ids.device)
        frequency = 10000.0 ** (-torch.arange(_DIM // 2, device=ids.device) / (_DIM // 2))
        x, kept = self.embed(ids), []
        for layer, states in zip(self.layers, past, strict=True):
            x, *states = layer(x, place[:, None] * frequency, states)
            kept += states
        return self.head(x), kept


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        call: ``"prompt"`` or ``"step"``, what TensorRT tunes for; both are in the range of either.
        is_python_free: Whether plugins are PTX.
        dtype: Of the model.
    """

    call: str
    is_python_free: bool
    dtype: str

    @property
    def plugins(self) -> str:
        """In words."""
        return "PTX" if self.is_python_free else "Python"


def main(argv: Sequence[str] | None = None) -> int:
    """Build, run, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m msa_compile.export.check_tensorrt", description="check engines")
    parser.add_argument("--length", type=int, default=4096, help="longest prompt and cache (default 4096)")
    parser.add_argument("--dtypes", default="float32,float16,bfloat16", help="by commas")
    parser.add_argument("--dry-run", action="store_true", help="lower, check and compile PTX; build no engine")
    options = parser.parse_args(argv)
    if not options.dry_run:
        try:
            require_tensorrt()
        except MissingPackageError as error:
            print(error, file=sys.stderr)
            return 2
    cases = [
        Case(call, is_python_free, dtype)
        for dtype in options.dtypes.split(",")
        for call in ("prompt", "step")
        for is_python_free in (False, True)
    ]
    rows, failures = [], 0
    run = _dry_row if options.dry_run else _row
    for case in cases:
        try:
            row = run(case, options.length)
        # A row that fails says why, and the others still run.
        except (MSAError, RuntimeError, AssertionError, ValueError, TypeError) as error:
            failures += 1
            row = (f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}", "", "", "", "")
        rows.append((case.call, case.plugins, case.dtype, *row))
        print(*rows[-1], sep="  ", flush=True)
    print(to_table(_COLUMNS, rows, left=_COLUMNS[:4]))
    return 1 if failures else 0


def program_of(case: Case, most: int, device: str) -> SparseProgram:
    """The decoder, captured; lengths and caches go up to `most`."""
    torch.manual_seed(0)
    model = Decoder().to(device, _DTYPES[case.dtype]).eval()
    length, before = (1, most - 1) if case.call == "step" else (most // 2 + 77, 0)
    # A size of 0 or 1 would be taken for a constant.
    length, before = max(length, 2), max(before, 2)
    ids = torch.randint(_VOCABULARY, (2, length), device=device)
    states = [[torch.randn(2, _GROUPS, before, _DIM).to(ids.device, _DTYPES[case.dtype]) for _ in "kv"]] * _LAYERS
    batch, tokens, past = Dim("batch", min=1, max=4), Dim("length", min=1, max=most), Dim("past", min=0, max=most)
    shapes = ({0: batch, 1: tokens}, [[{0: batch, 2: past}] * 2] * _LAYERS)
    return capture(Call(model, "", (ids, states), {}, shapes), _CONFIG, {}, ())


def _dry_row(case: Case, most: int) -> tuple[str, ...]:
    """What can be done without TensorRT: lowered, every node with a converter, memory, PTX for two chips."""
    sparse = program_of(case, most, "cpu")
    made = 0
    for capability in (80, 90) if case.is_python_free else (90,):
        program, _, largest = prepare(sparse, CHIPS[capability], is_python_free=case.is_python_free)
        made += len(compile_launches(program, CHIPS[capability]))
    return (f"lowered; {made} kernels compiled; largest {largest / 2**20:.0f} MiB; no engine", "", "", "", "")


def _row(case: Case, most: int) -> tuple[str, ...]:
    """Build an engine, compare it, time it. Not yet run."""
    from msa_compile.export.engine.run_engine import Engine

    sparse = program_of(case, most, "cuda")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "check.engine"
        start = time.perf_counter()
        written = write_engine(sparse, path, _CONFIG, is_python_free=case.is_python_free)
        seconds = time.perf_counter() - start
        plan = path.read_bytes()
        engine, module = Engine(plan), sparse.program.module(check_guards=False)
        args, kwargs = sparse.program.example_inputs
        ours = _milliseconds(lambda: engine(*sparse.example))
        theirs = _milliseconds(lambda: module(*args, **kwargs))
    said = f"{torch.cuda.get_device_name()} (sm_{chip_of(sparse.example[0].device).capability}): {written.checks[-1]}"
    return (said, f"{seconds:.0f}", f"{len(plan) / 2**20:.1f}", f"{ours:.3f}", f"{theirs:.3f}")


def _milliseconds(call: Callable[[], object]) -> float:
    """Median of a call."""
    for _ in range(10):
        call()
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    raise SystemExit(main())
