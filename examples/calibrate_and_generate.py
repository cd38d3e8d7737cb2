"""Train the index branches of a model on its own kind of text, look at the table, and generate with them.

    python -m examples.calibrate_and_generate                     # a few minutes on a CPU
    python -m examples.calibrate_and_generate --small --inner eager      # seconds, for CI

The model is a byte-level Llama, trained here on the Python standard library's sources; with your own model start at
`sparsify`. A run that is killed goes on where it was when it is started again with the same `--checkpoint`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import msa_compile
from examples.byte_model import build_model, load_corpus, spread_windows, train
from msa_compile import MSAConfig


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    torch.manual_seed(arguments.seed)
    corpus = load_corpus()
    layers, hidden = (2, 64) if arguments.small else (3, 128)
    model: Any = build_model(layers=layers, hidden=hidden, context=arguments.context)
    _, loss = train(
        model, corpus.train, context=arguments.context, seconds=60.0, steps=arguments.train_steps, seed=arguments.seed
    )
    print(f"\na byte-level Llama of {layers} layers, training loss {loss:.3f} nats a byte")

    config = MSAConfig(block_size=arguments.block_size, topk_blocks=arguments.topk, dense_below=0)
    msa_compile.sparsify(model, config, inner=arguments.inner)
    data = spread_windows(corpus.train, arguments.context, rows=2, count=arguments.batches)
    result = msa_compile.calibrate(
        model,
        data,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        min_mass_ratio=arguments.min_mass_ratio,
        min_found=arguments.min_found,
        checkpoint=arguments.checkpoint,
        seed=arguments.seed,
    )
    print(f"\n{result}\n")
    if arguments.plot:
        result.plot(arguments.plot)
        print(f"wrote {arguments.plot}")
    held_out = spread_windows(corpus.held_out, arguments.context, rows=2, count=2)
    print(msa_compile.evaluate(model, held_out, progress=False))
    _generate(model, corpus.held_out[: arguments.context // 2][None])
    _save_and_load(model, arguments.context)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.calibrate_and_generate", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a smaller model, a few steps, a short context")
    parser.add_argument("--context", type=int, help="tokens in a row (default 512)")
    parser.add_argument("--block-size", type=int, help="keys in a block (default 16)")
    parser.add_argument("--topk", type=int, default=4, help="blocks that a query attends to (default %(default)s)")
    parser.add_argument("--train-steps", type=int, help="steps that the model itself is trained (default: a minute)")
    parser.add_argument("--steps", type=int, help="steps of the calibration (default 300)")
    parser.add_argument("--batches", type=int, help="batches to go through again and again (default 160)")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--min-mass-ratio", type=float, default=0.95)
    parser.add_argument("--min-found", type=float, default=0.98)
    parser.add_argument("--checkpoint", type=Path, help="keep the state of the calibration there")
    parser.add_argument("--plot", type=Path, help="draw the calibration into this file")
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    defaults = {"context": 512, "block_size": 16, "steps": 300, "batches": 160}
    if arguments.small:
        defaults = {"context": 256, "block_size": 16, "steps": 20, "batches": 9}
        arguments.train_steps = arguments.train_steps or 30
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def _generate(model: Any, prompt: Tensor) -> None:
    """Continue a prompt greedily; its cache carries the index keys of the branches along."""
    new = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    text = bytes(new[0, prompt.shape[1] :].tolist()).decode("utf-8", "replace")
    print(f"\ncontinued: {text!r}")
    report = msa_compile.explain(model)
    print(f"dense calls: {report.dense_calls}, selections without index keys: {report.missed_selections}")


def _save_and_load(model: Any, context: int) -> None:
    """Put the branches into a folder, and from there into another copy of the base."""
    with TemporaryDirectory() as folder:
        msa_compile.save(model, folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        other = build_model(layers=model.config.num_hidden_layers, hidden=model.config.hidden_size, context=context)
        with msa_compile.dense(model):
            other.load_state_dict(model.state_dict())
        msa_compile.load(other.eval(), folder)
        same = msa_compile.explain(other).calibration == msa_compile.explain(model).calibration
    print(f"the adapter has {size:,} bytes; another copy of the base has the same decisions: {same}")


if __name__ == "__main__":
    raise SystemExit(main())
