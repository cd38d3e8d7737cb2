"""The demo's small model: a byte-level grouped-query Llama that learns the Python standard library's own sources."""

from __future__ import annotations

import math
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "site-packages", "test", "tests"}
HELD_OUT = 20  # every 20th file
WARM_UP_STEPS = 8


@dataclass(frozen=True)
class Corpus:
    """Text as bytes: `train` and `held_out` are int64 `[bytes]`, from different files."""

    train: Tensor
    held_out: Tensor
    files: int


def load_corpus() -> Corpus:
    """Read every module of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths = sorted((path for path in paths if SKIPPED_FOLDERS.isdisjoint(path.parts)), key=Path.as_posix)
    texts = [(root / path).read_bytes() for path in paths]
    held_out = b"".join(texts[::HELD_OUT])
    train = b"".join(text for index, text in enumerate(texts) if index % HELD_OUT)
    return Corpus(as_bytes(train), as_bytes(held_out), len(paths))


def as_bytes(text: bytes) -> Tensor:
    """The tokens of a text, int64 `[bytes]`: a token is a byte."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def build_model(*, layers: int, hidden: int, context: int) -> LlamaForCausalLM:
    """A Llama with random weights: 8 query heads share 2 key/value heads."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, text: Tensor, *, context: int, seconds: float, steps: int | None, seed: int
) -> tuple[int, float]:
    """Train with AdamW and a cosine schedule; returns the number of steps and the last smoothed loss (nats a byte).

    Args:
        model: The model, changed in place.
        text: int64 `[bytes]`.
        context: Longest sequence. Three steps of four are shorter, which learns more in the same time.
        seconds: Wall time to fill; a few first steps tell how many fit.
        steps: Number of steps, instead of `seconds`.
        seed: Of the choice of batches.
    """
    choose = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    started = time.perf_counter()
    total, step, smoothed = steps or 10**9, 0, math.log(256)
    bar = tqdm(total=steps, unit="step", desc="training")
    while step < total:
        # A machine that slows down half way may not make the demo late.
        if steps is None and time.perf_counter() - started > 1.5 * seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, total)
        length = context if step % 4 == 3 else context // 4
        loss = _loss(model, _batch(text, length, tokens=2 * context, choose=choose))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        smoothed = 0.95 * smoothed + 0.05 * loss.item()
        if steps is None and step == WARM_UP_STEPS:
            a_step = (time.perf_counter() - started) / step
            bar.total = total = max(step, round(seconds / a_step))
        bar.set_postfix_str(f"loss {smoothed:.3f}", refresh=False)
        bar.update()
    bar.close()
    model.eval()
    return step, smoothed


def fastest_threads(model: LlamaForCausalLM, text: Tensor, *, context: int) -> int:
    """One thread, or as many as torch has now: on a busy machine threads wait for each other, and one is faster."""
    choose = torch.Generator().manual_seed(0)
    seconds = {}
    for threads in {torch.get_num_threads(), 1}:
        torch.set_num_threads(threads)
        took = []
        for _ in range(3):
            started = time.perf_counter()
            _loss(model, _batch(text, context // 4, tokens=2 * context, choose=choose)).backward()
            took.append(time.perf_counter() - started)
        seconds[threads] = min(took)
    model.zero_grad()
    return min(seconds, key=lambda threads: seconds[threads])


def _learning_rate(step: int, total: int) -> float:
    """Linear up over the first steps, then half a cosine down to a tenth."""
    peak, ramp = 3e-3, 4 * WARM_UP_STEPS
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


def _batch(text: Tensor, length: int, *, tokens: int, choose: torch.Generator) -> Tensor:
    """Random pieces of `text`, int64 `[tokens // length, length]`."""
    starts = torch.randint(len(text) - length, (tokens // length,), generator=choose)
    return torch.stack([text[start : start + length] for start in starts.tolist()])


def _loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def spread_windows(text: Tensor, length: int, *, rows: int, count: int) -> list[dict[str, Tensor]]:
    """Batches of rows that are spread evenly over a text."""
    starts = torch.linspace(0, len(text) - length, rows * count).long().tolist()
    windows = torch.stack([text[start : start + length] for start in starts])
    return [{"input_ids": batch} for batch in windows.split(rows)]
