"""Measure one model, dense against sparse, from end to end."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import msa_compile
from msa_compile import MSAConfig
from msa_compile.backend import check_inner
from msa_compile.bench.amdahl import Shares, attention_flops, attention_seconds, other_flops_per_token
from msa_compile.bench.memory import peak_above
from msa_compile.bench.result import DENSE, DTYPES, SPARSE, Compiling, LengthResult, ModelResult, Request
from msa_compile.bench.spread import take_rounds
from msa_compile.bench.subject import Subject, build_subject, size_of
from msa_compile.errors import BenchArgumentError
from msa_compile.kernels.cache_dir import CACHE_VARIABLE
from msa_compile.kernels.stopwatch import seconds_of
from msa_compile.records import Site
from msa_compile.runtime import mark_dynamic

# A size that was taken for a constant shows as a number only when it has changed.
_STEPS_THAT_COMPILE = 3
# Relative difference of logits, all blocks selected, that a dtype's rounding over a model's layers explains.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def run_model(
    request: Request, say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
) -> ModelResult:
    """Measure.

    Args:
        request: What.
        say: Takes progress.

    Raises:
        BenchArgumentError, UnknownModelError: The request cannot be met.
        MSAError: The model cannot be made sparse.
    """
    check_lengths(request.lengths)
    check_inner(request.inner)
    say(f"building {request.model}")
    subject = build_subject(request.model, request.layers, request.dtype, request.device)
    say(f"{size_of(subject.model) / 2**30:.2f} GiB of weights; {'; '.join(subject.notes)}")
    result = _measure(subject, request, say)
    if not (result.lengths and request.has_compile_times):
        return result
    # The processes that compile need the memory.
    del subject
    torch._dynamo.reset()
    gc.collect()
    if request.device.type == "cuda":
        torch.cuda.empty_cache()
    same = replace(request, layers=result.layers)
    taken = {name: compile_times(same, name, say) for name in (DENSE, SPARSE)}
    return replace(result, compiling={name: times for name, times in taken.items() if times is not None})


def _measure(subject: Subject, request: Request, say: Callable[[str], None]) -> ModelResult:
    """Everything but compile times."""
    with torch.no_grad():
        verdict = _gate(subject, request)
        say(f"gate: {verdict}")
        lengths: list[LengthResult] = []
        pair = _Pair(subject, request)
        if verdict.startswith("green"):
            other = other_flops_per_token(lambda n: pair.plain(**subject.first(_prompt(subject, n, request), 0)))
            for length in sorted(request.lengths):
                lengths.append(pair.measure(length, other, say))
        report = msa_compile.explain(pair.sparse)
    return ModelResult(
        model=request.model,
        layers=subject.layers,
        all_layers=subject.all_layers,
        parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
        notes=subject.notes,
        dtype=str(request.dtype).removeprefix("torch."),
        device=str(request.device),
        threads=torch.get_num_threads(),
        inner=request.inner,
        torch=torch.__version__,
        block_size=request.block_size,
        topk=request.topk,
        dense_below=tuple(dict.fromkeys(str(site.dense_below) for site in report.sparse)),
        indexer=request.indexer,
        learned_sites=len({site.name for site in report.sparse if site.indexer == "learned"}),
        missed_selections=report.missed_selections,
        gate=verdict,
        sparse_sites=len({site.name for site in report.sparse}),
        dense_sites=len({site.name for site in report.dense}),
        dense_calls=report.dense_calls,
        lengths=tuple(lengths),
        compiling={},
    )


def check_lengths(lengths: tuple[int, ...]) -> None:
    """Refuse lengths that are no prompts.

    Raises:
        BenchArgumentError: There is none, or one is too short.
    """
    if not lengths or min(lengths) < 2:
        raise BenchArgumentError(f"lengths are {list(lengths)}; legal are one or more whole numbers from 2")


def _prompt(subject: Subject, length: int, request: Request) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(subject.vocabulary, (1, length), generator=generator).to(request.device)


def _config(request: Request) -> MSAConfig:
    return MSAConfig(
        block_size=request.block_size,
        topk_blocks=request.topk,
        dense_below=request.dense_below,
        indexer=request.indexer,
    )


def _gate(subject: Subject, request: Request) -> str:
    """With all blocks selected, prefill and one step have to give the logits of the untouched model."""
    length = 3 * request.block_size + request.block_size // 2 + 1
    config = replace(_config(request), topk_blocks=length // request.block_size + 2, dense_below=0)
    ids, token = _prompt(subject, length, request), _prompt(subject, 1, request)
    sparse = msa_compile.sparsify(subject.twin(), config, example_inputs=subject.first(ids, 1), inner="eager")
    worst = 0.0
    before: dict[str, tuple[dict[str, Any], Any]] = {}
    for step in (False, True):
        logits = {}
        for name, model in ((DENSE, subject.model), (SPARSE, sparse)):
            given = subject.after(token, *before[name]) if step else subject.first(ids, 1)
            before[name] = given, model(**given)
            logits[name] = subject.logits(before[name][1]).double()
        worst = max(worst, float((logits[SPARSE] - logits[DENSE]).norm() / logits[DENSE].norm()))
    report = msa_compile.explain(sparse)
    if report.dense_calls:
        return f"RED: {report.dense_calls} calls of the sparse model ran dense"
    if report.missed_selections:
        return f"RED: {report.missed_selections} selections of a learned indexer found no index keys"
    tolerance = _TOLERANCE[request.dtype]
    if not worst <= tolerance:
        return f"RED: with all blocks the logits differ from dense by {worst:.1e}, more than {tolerance:.0e}"
    return f"green: with all blocks the logits differ from dense by {worst:.1e}"


class _Pair:
    """The dense and the sparse model on the same weights, and arguments and results of their last calls."""

    def __init__(self, subject: Subject, request: Request) -> None:
        self.subject = subject
        self.request = request
        self.plain = subject.model
        self.before: dict[str, tuple[dict[str, Any], Any]] = {}
        self.room = _STEPS_THAT_COMPILE + request.new_tokens
        ids = _prompt(self.subject, min(request.lengths), request)
        self.sparse = msa_compile.sparsify(
            self.subject.twin(),
            _config(request),
            example_inputs=self.subject.first(ids, self.room),
            inner=request.inner,
        )
        self.dense: Callable[..., Any] = self.subject.twin()
        if request.inner != "eager":
            self.dense = torch.compile(self.dense, backend=request.inner)

    def call(self, name: str, given: dict[str, Any]) -> None:
        """Call one of the models; what it was given and gave stays for the next step."""
        if name == DENSE:
            # Like the door of the sparse model: lengths are open from the first call on.
            mark_dynamic(((), given))
            self.before[name] = given, self.dense(**given)
        else:
            self.before[name] = given, self.sparse(**given)

    def prefills(self, length: int) -> dict[str, Callable[[], None]]:
        """A call of each model with a prompt."""
        ids, first = _prompt(self.subject, length, self.request), self.subject.first
        return {
            name: lambda name=name: self.call(name, first(ids, self.room))  # type: ignore[misc]
            for name in (DENSE, SPARSE)
        }

    def steps(self) -> dict[str, Callable[[], None]]:
        """A call of each model with one more token."""
        token = _prompt(self.subject, 1, self.request)
        after = self.subject.after
        return {
            name: lambda name=name: self.call(name, after(token, *self.before[name]))  # type: ignore[misc]
            for name in (DENSE, SPARSE)
        }

    def measure(self, length: int, other_flops: float, say: Callable[[str], None]) -> LengthResult:
        """Time and memory at one length."""
        request, device = self.request, self.request.device
        say(f"{length} tokens: first calls")
        prefills, steps = self.prefills(length), self.steps()
        peaks: dict[str, int | None] = {}
        for name in (DENSE, SPARSE):
            prefills[name]()
            self.before.pop(name)
            _, peaks[name] = peak_above(prefills[name], device)
        say(f"{length} tokens: prefill")
        prefill = take_rounds(prefills, device, seconds=request.seconds, least=3, most=7)
        for _ in range(_STEPS_THAT_COMPILE):
            for name in (DENSE, SPARSE):
                steps[name]()
        say(f"{length} tokens: decode")
        step = take_rounds(steps, device, seconds=request.seconds, least=3, most=request.new_tokens)
        sites = self._sites()
        alone = attention_seconds(sites, length, request.dtype, device, seconds=request.seconds / 4)
        flops = attention_flops(sites, length)
        result = LengthResult(
            length=length,
            first_token={name: prefill.of(name) for name in (DENSE, SPARSE)},
            first_token_ratio=prefill.ratio(DENSE, SPARSE),
            step={name: step.of(name) for name in (DENSE, SPARSE)},
            step_ratio=step.ratio(DENSE, SPARSE),
            peak_bytes=peaks,
            shares=Shares(
                prefill_flops=flops / (flops + other_flops * length),
                prefill_time=min(1.0, alone[0] / prefill.of(DENSE).median),
                decode_time=min(1.0, alone[1] / step.of(DENSE).median),
            ),
        )
        self.before.clear()
        return result

    def _sites(self) -> list[Site]:
        """The sites that were made sparse, each once."""
        return list({site.name: site for site in msa_compile.explain(self.sparse).sparse}.values())


def first_calls(request: Request, name: str) -> float:
    """Seconds that the first prefill and steps of one of the two models take above later ones, in this process."""
    subject = build_subject(request.model, request.layers, request.dtype, request.device)
    with torch.no_grad():
        pair = _Pair(subject, request)
        prefill, step = pair.prefills(min(request.lengths))[name], pair.steps()[name]
        calls = [prefill, *[step] * _STEPS_THAT_COMPILE]
        first, later = (sum(seconds_of(call, request.device) for call in calls) for _ in range(2))
    return max(0.0, first - later)


def compile_times(request: Request, name: str, say: Callable[[str], None]) -> Compiling | None:
    """Compile one of the two models in two new processes that share a cache, empty for the first.

    Returns:
        ``None`` if a process failed, which is said; the other numbers are right all the same.
    """
    command = [sys.executable, "-m", "msa_compile.bench", *to_arguments(request), "--first-calls", name]
    taken = []
    with tempfile.TemporaryDirectory(prefix="msa_bench_", ignore_cleanup_errors=True) as folder:
        # The break-even is measured anew in the first, as in a user's first process.
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TRITON_CACHE_DIR": f"{folder}/triton",
            CACHE_VARIABLE: f"{folder}/msa_compile",
        }
        for state in ("cold", "warm"):
            say(f"compiling the {name} model, {state}")
            done = subprocess.run(command, env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                say(f"that process ended with {done.returncode}: the compile times of the {name} model are left out")
                return None
            taken.append(float(json.loads(done.stdout.splitlines()[-1])))
    return Compiling(*taken)


def to_arguments(request: Request) -> list[str]:
    """The command line that means this request."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    given = {
        "--lengths": ",".join(map(str, request.lengths)),
        "--layers": request.layers,
        "--dtype": names[request.dtype],
        "--device": request.device.type,
        "--threads": torch.get_num_threads(),
        "--inner": request.inner,
        "--block-size": request.block_size,
        "--topk": request.topk,
        "--dense-below": None if request.dense_below == "auto" else request.dense_below,
        "--indexer": request.indexer,
        "--new": request.new_tokens,
        "--seconds": request.seconds,
    }
    return [request.model, *(part for name, value in given.items() if value is not None for part in (name, str(value)))]
