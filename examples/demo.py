"""Train a small model, make its attention sparse, and compare: `python -m examples.demo`, or `make demo`.

    python -m examples.demo                      # about a minute of training, the rest compiles and compares
    python -m examples.demo --small --inner eager            # a few seconds, for CI
    python -m examples.demo --model NAME --text FILE         # a hub model instead, not trained

The text is the Python standard library's own source code, split by file into what is learned and what is held out.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msa_compile
from examples.block_picture import draw_blocks, selected_blocks
from examples.byte_model import as_bytes, build_model, fastest_threads, load_corpus, train
from examples.speed_line import speed_line
from msa_compile import MSAConfig

NEW_TOKENS = 120
CALIBRATION_STEPS = 240
BATCH = 2  # windows a call


@dataclass(frozen=True)
class Subject:
    """A trained model and the text to try it on."""

    model: Any
    held_out: Tensor  # token ids, int64 [tokens]
    decode: Any  # token ids to text
    learned_from: Tensor | None = None  # what it was trained on here, int64 [tokens]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    print(f"torch {torch.__version__}, inner compiler {arguments.inner}, {torch.get_num_threads()} thread(s)")
    started = time.perf_counter()
    try:
        subject = _hub_model(arguments) if arguments.model else _trained_model(arguments)
    except OSError as error:
        print(f"cannot load the model {arguments.model!r}: {error}", file=sys.stderr)
        print("NAME is a model on the Hugging Face hub, which has to be reachable, or a local folder.", file=sys.stderr)
        return 2
    windows = _windows(subject, arguments)
    context = windows.shape[1]
    shares = {max(1, context // arguments.block_size // share) for share in (4, 8, 16)}
    budgets = sorted(arguments.topk or shares, reverse=True)

    report = _explain(subject.model, budgets[0], arguments)
    _compare_perplexity(subject.model, windows, budgets, arguments)
    if subject.learned_from is not None and budgets[-1] * arguments.block_size < context:
        _calibrate(subject, windows, arguments)
    _continue_prompt(subject, windows[0, : context * 3 // 4], budgets[-1], arguments)
    _draw(subject.model, windows[:1], report.sparse, budgets[len(budgets) // 2], arguments)
    with _stage("speed of attention here, on random tensors"):
        small = {"block_size": arguments.block_size, "topk_blocks": 4, "longest": 512} if arguments.small else {}
        print(speed_line(**small))
    print(f"\nall done in {time.perf_counter() - started:.0f} s")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="dense against sparse attention")
    parser.add_argument("--model", metavar="NAME", help="a causal language model of the hub, or a local folder")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to evaluate on (default: held-out sources)")
    parser.add_argument("--context", type=int, help="tokens in a window (default 1024, 2048 with --model)")
    parser.add_argument("--block-size", type=int, help="keys in a block (default 32, 128 with --model)")
    parser.add_argument("--topk", type=int, nargs="+", help="budgets (default: 1/16, 1/8 and 1/4 of the blocks)")
    parser.add_argument("--windows", type=int, help="held-out windows for the perplexity (default 16, 4 with --model)")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time (default 60)")
    parser.add_argument("--steps", type=int, help="training steps, instead of --seconds")
    parser.add_argument("--small", action="store_true", help="a smaller model, a few steps, a short context")
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of torch (default: what is fastest)")
    parser.add_argument("--out", type=Path, default=Path("out/demo_blocks.png"), help="picture (default %(default)s)")
    arguments = parser.parse_args(argv)
    defaults = {"context": 1024, "block_size": 32, "windows": 16}
    if arguments.model:
        defaults = {"context": 2048, "block_size": 128, "windows": 4}
    if arguments.small:
        defaults = {"context": 256, "block_size": 16, "windows": 4}
        arguments.steps = arguments.steps or 30
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


@contextlib.contextmanager
def _stage(name: str) -> Iterator[None]:
    """Print the name of a stage before it and its time after it."""
    print(f"\n== {name}", flush=True)
    started = time.perf_counter()
    yield
    print(f"-- {time.perf_counter() - started:.1f} s", flush=True)


def _trained_model(arguments: argparse.Namespace) -> Subject:
    with _stage("text: the standard library's own sources"):
        corpus = load_corpus()
        print(f"{corpus.files} files; {len(corpus.train):,} bytes to learn, {len(corpus.held_out):,} held out")
    layers, hidden = (2, 64) if arguments.small else (3, 128)
    model = build_model(layers=layers, hidden=hidden, context=arguments.context)
    size = sum(parameter.numel() for parameter in model.parameters())
    with _stage(f"training a byte-level Llama: {size:,} parameters, 8 query heads, 2 key/value heads"):
        if not arguments.threads:
            torch.set_num_threads(fastest_threads(model, corpus.train, context=arguments.context))
            print(f"fastest here with {torch.get_num_threads()} thread(s)")
        steps, loss = train(
            model,
            corpus.train,
            context=arguments.context,
            seconds=arguments.seconds,
            steps=arguments.steps,
            seed=arguments.seed,
        )
        print(f"{steps} steps, training loss {loss:.3f} nats a byte")
    held_out = as_bytes(arguments.text.read_bytes()) if arguments.text else corpus.held_out
    return Subject(model, held_out, lambda ids: bytes(ids.tolist()).decode("utf-8", "replace"), corpus.train)


def _hub_model(arguments: argparse.Namespace) -> Subject:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _stage(f"loading {arguments.model} for {device}"):
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", attn_implementation="sdpa")
        text = bytes(load_corpus().held_out.tolist()) if arguments.text is None else arguments.text.read_bytes()
        # Bytes enough for the windows; tokenizing megabytes would take longer than the demo.
        text = text[: 8 * arguments.context * arguments.windows]
        held_out = tokenizer(text.decode("utf-8", "replace"), return_tensors="pt", verbose=False).input_ids[0]
    return Subject(model.to(device).eval(), held_out.to(device), tokenizer.decode)


def _windows(subject: Subject, arguments: argparse.Namespace) -> Tensor:
    """Windows of text spread evenly over the held-out text, `[windows, context]`."""
    tokens = len(subject.held_out)
    longest = getattr(subject.model.config, "max_position_embeddings", None) or arguments.context
    context = min(arguments.context, longest, tokens)
    return _spread(subject.held_out, context, min(arguments.windows, tokens // context))


def _spread(text: Tensor, length: int, count: int) -> Tensor:
    """Windows spread evenly over a text, `[count, length]`."""
    starts = torch.linspace(0, len(text) - length, count).long().tolist()
    return torch.stack([text[start : start + length] for start in starts])


def _sparsify(model: nn.Module, topk: int, arguments: argparse.Namespace) -> None:
    # dense_below=0: every call really runs sparse, however short.
    config = MSAConfig(block_size=arguments.block_size, topk_blocks=topk, dense_below=0)
    msa_compile.sparsify(model, config, inner=arguments.inner)


def _explain(model: nn.Module, topk: int, arguments: argparse.Namespace) -> msa_compile.Report:
    with _stage("sparsify: what was found"):
        _sparsify(model, topk, arguments)
        report = msa_compile.explain(model)
        print(report)
    return report


def _compare_perplexity(
    model: nn.Module, windows: Tensor, budgets: Sequence[int], arguments: argparse.Namespace
) -> None:
    """Print held-out perplexity, dense and at each budget; the model has the first budget and is left with the last."""
    count, length = windows.shape
    with _stage(f"perplexity on {count} held-out windows of {length} tokens"):
        print(f"{'attention':<20}{'keys read':>11}{'perplexity':>13}{'to dense':>11}{'compile':>11}{'run':>9}")
        with msa_compile.dense(model):
            dense, seconds = _perplexity(model, windows)
        print(f"{'dense':<20}{1:>11.1%}{dense:>13.4f}{'':>22}{seconds:>7.1f} s")
        for topk in budgets:
            if topk != budgets[0]:
                msa_compile.unsparsify(model)
                _sparsify(model, topk, arguments)
            _, first_call = _perplexity(model, windows[:BATCH])
            sparse, seconds = _perplexity(model, windows)
            share = _share_of_keys(length, arguments.block_size, topk)
            name = f"{topk} blocks of {arguments.block_size}"
            change = sparse / dense - 1
            print(f"{name:<20}{share:>11.1%}{sparse:>13.4f}{change:>+11.2%}{first_call:>9.1f} s{seconds:>7.1f} s")


def _calibrate(subject: Subject, windows: Tensor, arguments: argparse.Namespace) -> None:
    """Train index branches for the last budget, and print what selection by them costs."""
    steps = 4 if arguments.small else CALIBRATION_STEPS
    with _stage(f"calibration: {steps} steps of learning to select with one small key a token"):
        assert subject.learned_from is not None, "asked before"
        rows = _spread(subject.learned_from, windows.shape[1], BATCH * (steps + 1))
        data = [{"input_ids": batch} for batch in rows.split(BATCH)]
        result = msa_compile.calibrate(subject.model, data, steps=steps, learning_rate=1e-2, progress=False)
        print(result)
        perplexity, _ = _perplexity(subject.model, windows)
        print(f"calibrated, perplexity on the same windows: {perplexity:.4f}")


def _perplexity(model: nn.Module, windows: Tensor) -> tuple[float, float]:
    """Perplexity over all windows, and the seconds it took."""
    started = time.perf_counter()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in windows.split(BATCH):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
            count += batch[:, 1:].numel()
    return math.exp(total / count), time.perf_counter() - started


def _share_of_keys(length: int, block_size: int, topk: int) -> float:
    """Of the keys that the queries of a causal window see, the share that they read: whole blocks and the local one."""
    read = sum(p % block_size + 1 + min(topk - 1, p // block_size) * block_size for p in range(length))
    return read / (length * (length + 1) // 2)


def _continue_prompt(subject: Subject, prompt: Tensor, topk: int, arguments: argparse.Namespace) -> None:
    """Continue a held-out prompt greedily, dense and sparse, with a key/value cache; then give the dense model back."""
    model, ids = subject.model, prompt[None]
    new = min(NEW_TOKENS, len(prompt) // 3)  # the prompt is three quarters of the context
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    with _stage(f"greedy continuation of a held-out prompt of {len(prompt)} tokens"):
        with msa_compile.dense(model):
            dense = model.generate(ids, **options)[0, len(prompt) :]
        sparse = model.generate(ids, **options)[0, len(prompt) :]
        _print_text("the prompt ends", "..." + subject.decode(prompt[-NEW_TOKENS:]))
        _print_text("dense", subject.decode(dense))
        _print_text(f"sparse, {topk} blocks of {arguments.block_size}", subject.decode(sparse))
        same = int((dense[: len(sparse)] == sparse[: len(dense)]).long().cumprod(0).sum())
        print(f"the first {same} of {len(dense)} tokens are the same")
        print(f"calls that ran dense although the model is sparsified: {msa_compile.explain(model).dense_calls}")
        msa_compile.unsparsify(model)


def _print_text(name: str, text: str) -> None:
    print(f"[{name}]")
    print("\n".join("  | " + line for line in text.splitlines()))


def _draw(
    model: nn.Module, ids: Tensor, sites: Sequence[msa_compile.Site], topk: int, arguments: argparse.Namespace
) -> None:
    site = sites[len(sites) // 2]
    with _stage(f"picture: blocks selected at {site.name}"):
        chosen, heads = selected_blocks(
            model, ids, site=site.name, groups=site.key_value_heads, block_size=arguments.block_size, topk=topk
        )
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        title = f"Key blocks selected at {site.name}: {topk} of {-(-ids.shape[1] // arguments.block_size)} a query"
        draw_blocks(chosen, heads=heads, block_size=arguments.block_size, title=title, out=arguments.out)
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    raise SystemExit(main())
