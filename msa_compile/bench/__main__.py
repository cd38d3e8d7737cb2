"""``python -m msa_compile.bench MODEL --lengths 8192,32768``: dense against sparse, end to end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from msa_compile.backend import INNER_COMPILERS
from msa_compile.bench.model import first_calls, run_model
from msa_compile.bench.result import DENSE, DTYPES, SPARSE, Request
from msa_compile.bench.subject import SHAPES
from msa_compile.bench.table import to_text
from msa_compile.errors import BenchArgumentError, MSAError


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for and print it; 1 if the gate is red, 2 on a mistake."""
    options = parse(argv)
    before = torch.get_num_threads()
    try:
        if options.threads is not None:
            if options.threads < 1:
                raise BenchArgumentError(f"threads is {options.threads}; legal are whole numbers from 1")
            torch.set_num_threads(options.threads)
        request = to_request(options)
        if options.first_calls:
            print(json.dumps(first_calls(request, options.first_calls)))
            return 0
        result = run_model(request)
    except MSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    print(to_text(result))
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
        print(f"wrote {options.json}", file=sys.stderr)
    return 0 if result.is_green else 1


def to_request(options: argparse.Namespace) -> Request:
    """What the command line asks for.

    Raises:
        BenchArgumentError: It cannot be met here.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchArgumentError("device is cuda, and torch finds none here; nothing was run")
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    return Request(
        model=options.model,
        lengths=parse_lengths(options.lengths),
        layers=options.layers,
        dtype=DTYPES[dtype],
        device=device,
        inner=options.inner,
        block_size=options.block_size,
        topk=options.topk,
        dense_below="auto" if options.dense_below is None else options.dense_below,
        indexer=options.indexer,
        new_tokens=options.new,
        seconds=options.seconds,
        has_compile_times=not options.no_compile_times,
    )


def parse_lengths(text: str) -> tuple[int, ...]:
    """``"8192,32768"`` as numbers.

    Raises:
        BenchArgumentError: A part is no whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise BenchArgumentError(f"lengths are {text!r}; legal are whole numbers with commas, 8192,32768") from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m msa_compile.bench", description="time a model, dense and sparse")
    add = parser.add_argument
    shapes = ", ".join(SHAPES)
    add("model", metavar="MODEL", help=f"a hub name, a local folder, a config.json, or a built-in shape: {shapes}")
    add("--lengths", default="8192,32768", metavar="N,N", help="tokens of the prompts (default %(default)s)")
    add("--layers", type=int, metavar="N", help="keep N layers (default: all, or as many of 4 as fit into memory)")
    add("--dtype", choices=tuple(DTYPES), help="(default fp32 on a CPU, bf16 on a GPU)")
    add("--device", choices=("cpu", "cuda"), help="(default cuda where there is one)")
    add("--threads", type=int, metavar="N", help="of torch on a CPU (default: torch's own)")
    add("--inner", choices=INNER_COMPILERS, default="inductor", help="compiler of both models (default %(default)s)")
    add("--block-size", type=int, default=128)
    add("--topk", type=int, default=16, help="blocks a query (default %(default)s)")
    add("--dense-below", type=int, metavar="N", help="(default: the measured break-even; 0: everything runs sparse)")
    add("--indexer", choices=("keys", "learned"), default="keys", help="(default %(default)s; learned is not trained)")
    add("--new", type=int, default=16, metavar="N", help="tokens of decode to time, at most (default %(default)s)")
    add("--seconds", type=float, default=20.0, help="to fill with rounds of one length (default %(default)s)")
    add("--no-compile-times", action="store_true", help="leave out what takes four more processes")
    add("--first-calls", choices=(DENSE, SPARSE), help=argparse.SUPPRESS)
    add("--json", type=Path, metavar="FILE", help="write everything measured there too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
