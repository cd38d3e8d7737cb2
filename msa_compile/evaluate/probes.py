"""Prompts in which something has to be found again: a needle, one of many needles, a chain of variables.

Without a tokenizer they are made of token ids alone. The text around is the user's own; a fact is a few random tokens,
the key, followed by others, the value:

    needle              ... K V ... K -> V
    multi-key           ... K1 V1 ... K2 V2 ... K3 V3 ... K2 -> V2, where the keys differ in their last token only
    variable-tracking   ... ;A V; ... ;B A; ... ;C B; ... ;C -> B ;B -> A ;A -> V: each hop is a retrieval of its own

So they measure whether a model continues what it has seen once (induction), and above all whether the sparse model
finds what the dense one finds. An untrained model finds nothing. With a tokenizer the same three are English sentences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from msa_compile.batches import Batch
from msa_compile.errors import EvaluateArgumentError
from msa_compile.evaluate.compare import rows_of
from msa_compile.evaluate.result import ProbeResult
from msa_compile.evaluate.sentences import encoder, spell
from msa_compile.progress import progress_bar

PROBES = ("needle", "multi-key", "variable-tracking")
KEY, VALUE = 4, 4  # tokens
MANY = 4  # keys of the multi-key probe, variables of a chain
_MOST_TOKENS = 1 << 13  # of one call, but for a single longer prompt
_DIGITS = 10

Logits = Callable[[Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ProbePlan:
    """Which probes to run.

    Attributes:
        lengths: Of the prompts, answer included, in tokens; none is no probes.
        samples: Prompts of each probe and length.
        tokenizer: Something with `encode(text)`, or `None` for probes of token ids.
        seed: Of what is hidden and where.
    """

    lengths: tuple[int, ...] = ()
    samples: int = 8
    tokenizer: Any = None
    seed: int = 0


@dataclass(frozen=True)
class Puzzle:
    """What is hidden in one prompt, in token ids.

    Attributes:
        facts: To hide, in the order in which they stand.
        ending: What the prompt ends with: pieces, and whether a piece has to be found or is given.
    """

    facts: Sequence[Sequence[int]]
    ending: Sequence[tuple[Sequence[int], bool]]

    @property
    def size(self) -> int:
        """All its tokens."""
        return sum(map(len, self.facts)) + sum(len(piece) for piece, _ in self.ending)


def check_plan(plan: ProbePlan) -> ProbePlan:
    """`plan` if it can be run.

    Raises:
        EvaluateArgumentError: A length, the number of samples or the tokenizer will not do.
    """
    numbers = [number for number in (*plan.lengths, plan.samples) if isinstance(number, int) and number > 0]
    if len(numbers) != len(plan.lengths) + 1:
        raise EvaluateArgumentError(
            f"probe_lengths is {list(plan.lengths)} and probe_samples {plan.samples!r}; both are whole numbers from 1"
        )
    # Before anything long is run; sentences may differ by a token or two from prompt to prompt.
    largest = max((_puzzle(name, range(64), plan, torch.Generator().manual_seed(0)).size, name) for name in PROBES)
    if plan.lengths and min(plan.lengths) < largest[0]:
        _refuse_length(min(plan.lengths), *largest)
    return plan


def run_probes(
    logits: Logits, call: Callable[[Tensor], Batch], text: Tensor, plan: ProbePlan, *, progress: bool
) -> tuple[ProbeResult, ...]:
    """Every probe at every length, shortest first.

    Args:
        logits: Calls the dense and the sparse model.
        call: Makes a call of the model with token ids `[B, T]`.
        text: Token ids of the data, int64 `[n]`, in which things are hidden.
        plan: Which.
        progress: Whether a bar is shown.
    """
    results = []
    total = len(PROBES) * len(plan.lengths) * plan.samples
    with progress_bar("probes", "prompt", total=total, shown=progress) as bar:
        for length in sorted(set(plan.lengths)):
            for name in PROBES:
                prompts, asked = build_prompts(name, length, text, plan)
                results.append(_run(logits, call, prompts, asked, name, plan, bar.update))
    return tuple(results)


def build_prompts(name: str, length: int, text: Tensor, plan: ProbePlan) -> tuple[Tensor, Tensor]:
    """Prompts of one probe, int64 `[samples, length]`, and which of their tokens have to be found, bool of that shape.

    Raises:
        EvaluateArgumentError: The length has no room for what is to be hidden.
    """
    choose = torch.Generator().manual_seed(plan.seed + 1000 * length + PROBES.index(name))
    alphabet = text.unique()
    prompts = []
    for _ in range(plan.samples):
        around = _excerpt(text, length, choose)
        puzzle = _puzzle(name, _rarest(alphabet, around, choose).tolist(), plan, choose)
        if puzzle.size > length:
            _refuse_length(length, puzzle.size, name)
        prompts.append(_hide(puzzle, around, choose))
    return torch.stack([prompt for prompt, _ in prompts]), torch.stack([asked for _, asked in prompts])


def chance_of(plan: ProbePlan, vocabulary: int) -> float:
    """What guessing finds: one of all tokens, or of the digits of a number."""
    return 1 / vocabulary if plan.tokenizer is None else 1 / min(vocabulary, _DIGITS)


def _run(
    logits: Logits,
    call: Callable[[Tensor], Batch],
    prompts: Tensor,
    asked: Tensor,
    name: str,
    plan: ProbePlan,
    done: Callable[[int], object],
) -> ProbeResult:
    length = prompts.shape[1]
    vocabulary = 1
    found: list[tuple[Tensor, Tensor]] = []
    size = max(1, _MOST_TOKENS // length)
    for part, wanted in zip(prompts.split(size), asked.split(size), strict=True):
        dense, sparse = logits(call(part))
        vocabulary = sparse.shape[2]
        # The token before predicts a token; the answer so far is given.
        chunk = wanted.roll(-1, 1).flatten().nonzero()[:, 0]
        right = [rows_of(side, chunk, sparse.device).argmax(1).cpu() == part[wanted] for side in (dense, sparse)]
        found.append((right[0], right[1]))
        done(len(part))
    in_dense, in_sparse = (torch.cat(side) for side in zip(*found, strict=True))
    return ProbeResult(
        name=name,
        length=length,
        answers=len(in_dense),
        dense=in_dense.double().mean().item(),
        sparse=in_sparse.double().mean().item(),
        kept=in_sparse[in_dense].double().mean().item() if bool(in_dense.any()) else None,
        chance=chance_of(plan, vocabulary),
    )


def _excerpt(text: Tensor, length: int, choose: torch.Generator) -> Tensor:
    """`length` tokens of the text in a row; a text that is shorter is repeated."""
    if len(text) < length:
        text = text.repeat(-(-length // len(text)))
    start = int(torch.randint(len(text) - length + 1, (), generator=choose))
    return text[start : start + length]


def _rarest(alphabet: Tensor, around: Tensor, choose: torch.Generator) -> Tensor:
    """The alphabet in random order, what the text around has least of first: keys shall not occur in it."""
    counts = torch.bincount(around, minlength=int(alphabet.max()) + 1)[alphabet]
    shuffled = torch.randperm(len(alphabet), generator=choose)
    return alphabet[shuffled[counts[shuffled].argsort(stable=True)]]


def _puzzle(name: str, ids: Sequence[int], plan: ProbePlan, choose: torch.Generator) -> Puzzle:
    if plan.tokenizer is None:
        return _of_ids(name, ids, choose)
    return _of_sentences(name, plan.tokenizer, choose)


def _refuse_length(length: int, size: int, name: str) -> NoReturn:
    raise EvaluateArgumentError(
        f"a prompt of {length} tokens has no room for the {size} tokens of the probe {name!r}; give probe_lengths of "
        f"{2 * size} or more"
    )


def _of_ids(name: str, ids: Sequence[int], choose: torch.Generator) -> Puzzle:
    """A puzzle of token ids; `ids` are those to take, the best first."""
    count = 1 if name == "needle" else MANY
    # The last token of a key tells it from the others. As long as there are ids enough, none is used twice.
    order = torch.randperm(min(len(ids), 64), generator=choose).tolist()
    fresh = itertools.cycle([ids[index] for index in order])

    def some(number: int) -> tuple[int, ...]:
        return tuple(itertools.islice(fresh, number))

    if name == "variable-tracking":
        names, mark, value = [some(KEY) for _ in range(count)], some(1), some(VALUE)
        facts = [mark + names[0] + value + mark]
        facts += [mark + later + earlier + mark for earlier, later in itertools.pairwise(names)]
        ending: list[tuple[Sequence[int], bool]] = []
        for left, right in zip(names[::-1], [*names[-2::-1], value], strict=True):
            ending += [(mark + left, False), (right, True)]
        return Puzzle(facts, ending)
    same = some(KEY - 1)
    keys = [same + some(1) for _ in range(count)]
    values = [some(VALUE) for _ in keys]
    asked = int(torch.randint(count, (), generator=choose))
    facts = [key + value for key, value in zip(keys, values, strict=True)]
    return Puzzle(facts, [(keys[asked], False), (values[asked], True)])


def _of_sentences(name: str, tokenizer: Any, choose: torch.Generator) -> Puzzle:
    encode = encoder(tokenizer)
    facts, ending = spell(name, MANY, choose)
    return Puzzle([encode(fact) for fact in facts], [(encode(piece), is_asked) for piece, is_asked in ending])


def _hide(puzzle: Puzzle, around: Tensor, choose: torch.Generator) -> tuple[Tensor, Tensor]:
    """The prompt, as long as the text around, and what has to be found: facts in random places, in their order."""
    room = len(around) - puzzle.size
    cuts = torch.randint(room + 1, (len(puzzle.facts),), generator=choose).sort().values.tolist()
    parts: list[Tensor] = []
    for start, stop, fact in zip([0, *cuts], cuts, puzzle.facts, strict=False):
        parts += [around[start:stop], torch.tensor(fact)]
    parts.append(around[cuts[-1] : room])
    asked = [torch.zeros(sum(map(len, parts)), dtype=torch.bool)]
    for piece, is_asked in puzzle.ending:
        parts.append(torch.tensor(piece))
        asked.append(torch.full((len(piece),), is_asked))
    return torch.cat([part.long() for part in parts]), torch.cat(asked)
