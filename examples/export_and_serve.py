"""Calibrate a sparsified model, write it to an ONNX file with a cache, and generate text from onnxruntime alone.

`python -m examples.export_and_serve`: the small model of the demo, trained for a moment so that it has something to
say. Keys, values and index keys are buffers of a fixed length. The same greedy tokens come from PyTorch and from
onnxruntime, and both are timed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import msa_compile
from examples.byte_model import build_model, load_corpus, spread_windows, train
from msa_compile import MSAConfig


class Served:
    """A decoder in onnxruntime; needs numpy and onnxruntime, and neither torch nor this package."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.buffers = [entry for entry in self.session.get_inputs() if entry.name.startswith("past_key_values")]
        self.value_from = onnxruntime.OrtValue.ortvalue_from_numpy
        self.max_length = self.buffers[0].shape[2]

    def generate(self, prompt: list[int], new: int) -> list[int]:
        """Greedy tokens: the prompt in one call, then one call a token."""
        if len(prompt) + new > self.max_length:
            raise ValueError(f"{len(prompt)} + {new} tokens do not fit the {self.max_length} places of the cache")
        binding = self.session.io_binding()
        for entry in self.buffers:
            buffer = np.zeros((1, *entry.shape[1:]), dtype=np.float32)  # [1, Hkv, L, D]
            value = self.value_from(buffer)
            # One memory for what goes in and what comes out: a step writes its own places and copies nothing.
            binding.bind_ortvalue_input(entry.name, value)
            binding.bind_ortvalue_output(entry.name.replace("past_key_values", "present"), value)
        fresh, position, made = prompt, 0, []
        for _ in range(new):
            binding.bind_cpu_input("input_ids", np.array([fresh]))
            binding.bind_cpu_input("position", np.array([position]))
            binding.bind_output("logits")
            self.session.run_with_iobinding(binding)
            logits = binding.get_outputs()[-1].numpy()  # [1, 1, V]
            position += len(fresh)
            fresh = [int(logits[0, -1].argmax())]
            made += fresh
        return made


@torch.no_grad()
def generate_in_torch(model: LlamaForCausalLM, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens of the sparsified model, with transformers' own cache."""
    ids: Tensor = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=new,
        do_sample=False,
    )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def timed(make: Callable[[], list[int]]) -> tuple[list[int], float]:
    """What is made, and tokens a second of the second call: the first one compiles."""
    make()
    started = time.perf_counter()
    made = make()
    return made, len(made) / (time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.export_and_serve", description=__doc__.splitlines()[0])
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--prompt", type=int, default=384, help="bytes of the prompt (default 384)")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default 60)")
    parser.add_argument(
        "--calibrate", type=int, default=20, help="calibration steps (default 20); 0: select by the keys"
    )
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--out", type=Path, help="where the ONNX file goes (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    length = arguments.prompt + arguments.new
    corpus = load_corpus()
    model = build_model(layers=2, hidden=arguments.hidden, context=length)
    train(model, corpus.train, context=length // 4 * 4, seconds=0, steps=arguments.steps, seed=0)

    prompt = corpus.held_out[: arguments.prompt].tolist()
    example = {"input_ids": torch.tensor([prompt[:64]])}
    msa_compile.sparsify(model, MSAConfig(block_size=16, topk_blocks=8, dense_below=0), inner=arguments.inner)
    if arguments.calibrate:
        batches = spread_windows(corpus.train, length, rows=2, count=8)
        # A bar of 0: so few steps are to show how it goes, and not to be good.
        bars = {"min_mass_ratio": 0.0, "min_found": 0.0}
        print(msa_compile.calibrate(model, batches, steps=arguments.calibrate, **bars), "\n")
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.out or Path(folder) / "model.onnx"
        print(msa_compile.export(model, path, example_inputs=example, cache="static", max_length=length))
        served = Served(path, torch.get_num_threads())
        in_torch, torch_speed = timed(lambda: generate_in_torch(model, prompt, arguments.new))
        in_onnx, onnx_speed = timed(lambda: served.generate(prompt, arguments.new))
    print(f"\nafter {len(prompt)} bytes of a held-out file: {bytes(in_onnx).decode(errors='replace')!r}")
    same = in_torch == in_onnx
    print(f"the {arguments.new} tokens of PyTorch and onnxruntime are {'the same' if same else 'NOT the same'}")
    print(f"tokens a second, prompt included: PyTorch {torch_speed:.1f}, onnxruntime {onnx_speed:.1f}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
