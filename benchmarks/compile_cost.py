"""``python -m benchmarks.compile_cost``: what the first call of a sparsified model costs, against plain Inductor.

Each measurement is a process of its own with an Inductor cache of its own: once with the cache empty (cold) and once
more with what the first left (warm).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import msa_compile
from msa_compile import MSAConfig
from msa_compile.backend import MSABackend

RESULTS = Path(__file__).parent / "results"
LENGTH = 96


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_cost", description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="layers of the model that Inductor compiles")
    parser.add_argument("--trace-layers", type=int, default=32, help="layers of the model that is only re-traced")
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "SIZES", "LAYERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, sizes, layers = options.measure
        print(json.dumps(_measure(kind, sizes == "dynamic", int(layers))))
        return
    rows: list[dict[str, Any]] = []
    for sizes in ("static", "dynamic"):
        rows.append({**_run("trace", sizes, options.trace_layers, {}), "state": "cold"})
        for kind in ("inductor", "msa"):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    row = _run(kind, sizes, options.layers, {"TORCHINDUCTOR_CACHE_DIR": cache})
                    rows.append({**row, "state": state})
                    print(rows[-1])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compile_cost.md").write_text(_markdown(rows))
    print(f"wrote {(RESULTS / 'compile_cost.md').relative_to(Path.cwd())}")


def _run(kind: str, sizes: str, layers: int, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.compile_cost", "--measure", kind, sizes, str(layers)]
    done = subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _measure(kind: str, dynamic: bool, layers: int) -> dict[str, Any]:
    """Seconds of the first call of a Llama of ``layers`` layers, and of what of it is the re-trace and the passes."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 500, (2, LENGTH))
    mask = torch.ones_like(ids)
    for tensor in (ids, mask):
        for dim in (0, 1) if dynamic else ():
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    inner = "eager" if kind == "trace" else "inductor"
    backend: Any = MSABackend(MSAConfig(block_size=16, topk_blocks=2, dense_below=0), inner)
    compiled = torch.compile(model, backend="inductor" if kind == "inductor" else backend)
    started = time.perf_counter()
    with torch.no_grad():
        compiled(input_ids=ids, attention_mask=mask, use_cache=False)
    row: dict[str, Any] = {"kind": kind, "sizes": "dynamic" if dynamic else "static", "layers": layers}
    row["seconds"] = time.perf_counter() - started
    if kind != "inductor":
        (record,) = backend.records
        assert [site.decision for site in record.sites] == ["sparse"] * layers
        row |= {"retrace": record.retrace_seconds, "passes": record.passes_seconds, "nodes": record.nodes}
    return row


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What compiling costs",
        "",
        f"torch {torch.__version__}, msa_compile {msa_compile.__version__}, {platform.machine()} CPU, "
        f"{os.cpu_count()} cores, Llama of width 256, one prefill of {LENGTH} tokens, one run each. Made by",
        "`python -m benchmarks.compile_cost`. `trace` is Dynamo, the re-trace and the passes without a compiler; *to",
        "plain* is the ratio to plain Inductor in the same state.",
        "",
        "| what | sizes | layers | cache | first call, s | re-trace, s | passes, s | to plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = {(row["sizes"], row["state"]): row["seconds"] for row in rows if row["kind"] == "inductor"}
    for row in rows:
        own = [f"{row[part]:.1f}" if part in row else "" for part in ("retrace", "passes")]
        ratio = f"{row['seconds'] / plain[row['sizes'], row['state']]:.2f}x" if row["kind"] == "msa" else ""
        cells = [row["kind"], row["sizes"], row["layers"], row["state"], f"{row['seconds']:.1f}", *own, ratio]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
