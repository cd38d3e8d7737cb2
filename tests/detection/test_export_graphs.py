"""What is found in an exported program is what is found in the model, site by site."""

import dataclasses
import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from refused_models import Attention, Decoder, Padded
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import msa_compile
from msa_compile.errors import CaptureError, ExampleInputsError
from msa_compile.passes.canonicalize_exported import canonicalize_exported
from msa_compile.records import Reason, Site

transformers = pytest.importorskip("transformers")
from models.zoo import ZOO  # noqa: E402

LENGTH = 19
T = Dim("T", min=2, max=60)  # no longer than the position tables of the models
B = Dim("B", min=2, max=4)


class EinsumAttention(Attention):
    """Grouped queries, and no repeat of the keys."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x)
        scores = torch.einsum("bhgqd,bhkd->bhgqk", q.unflatten(1, (k.shape[1], -1)), k) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        out = torch.einsum("bhgqk,bhkd->bhgqd", weights, v).flatten(1, 2)
        return self.out(out.transpose(1, 2).flatten(2))


class BaddbmmAttention(Attention):
    """Heads folded into the batch, as Megatron has them; what the products are added to is not read."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (tensor.flatten(0, 1) for tensor in self.project(x))
        unread = torch.empty(q.shape[0], q.shape[1], q.shape[1])
        scores = torch.baddbmm(unread, q, k.transpose(1, 2), beta=0.0, alpha=1 / math.sqrt(q.shape[-1]))
        scores = scores.view(x.shape[0], self.heads, *scores.shape[1:]).masked_fill(~mask, torch.finfo(x.dtype).min)
        out = torch.bmm(scores.softmax(-1).flatten(0, 1), v).view(x.shape[0], self.heads, -1, q.shape[-1])
        return self.out(out.transpose(1, 2).flatten(2))


class FlexAttention(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        length = x.shape[1]
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
        q, k, v = self.project(x)
        return self.out(flex_attention(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2).flatten(2))


class Autocast(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x, mask).float()


class WithoutGradients(Decoder):
    """The mask is made in a region without gradients, and so is, under autocast, half of every attention's input."""

    def mask(self, x: Tensor, *extra: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            half = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x @ x.mT,))
        with torch.no_grad():
            return super().mask(x) & (half * 0 == 0)[:, None].any(0, keepdim=True).any()


class Dropped(Attention):
    """Attention written out, in training."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf).float().softmax(-1)
        return self.out((F.dropout(weights, 0.1, self.training) @ v).transpose(1, 2).flatten(2))


class BiasBuffer(Decoder):
    """An additive triangle that the model keeps: no mask handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("triangle", torch.ones(64, 64).tril().log())

    def mask(self, x: Tensor, *extra: Tensor) -> Tensor:
        return self.triangle[: x.shape[1], : x.shape[1]]


class OneLayerTwice(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = self.layers[0]


def bloom() -> nn.Module:
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=60, pad_token_id=0)
    return transformers.BloomForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=60
    )
    return transformers.BertModel(config)


def ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(length))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def gpt_fast() -> nn.Module:
    model = ZOO["gpt_fast"].build()
    model.setup_caches(2)
    return model


@dataclass(eq=False)
class Case:
    """One model, how it is called, and what every layer's row says: mask and reason, a mask `None` for any.

    Attributes:
        make: The model, without a cache where it is a transformers model.
        extra: What it takes after the token ids.
        rows: What is expected.
        sizes: The dimensions that are open: all batches and lengths, or lengths alone where a cache fixes the batch.
        gradients: Off for a model that writes into its own buffers.
    """

    make: Callable[[], nn.Module]
    rows: list[tuple[str, Reason | None]]
    extra: tuple[Any, ...] = ()
    sizes: tuple[Dim | None, Dim] = (B, T)
    gradients: bool = True

    def call(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        model = self.make()
        if not hasattr(model, "config"):
            return model, (ids(), *self.extra), {}
        model.config.use_cache = False
        return model.eval(), (), {"input_ids": ids(), "attention_mask": ones(2, LENGTH)}

    @functools.cache  # noqa: B019 - the cases live as long as this module
    def both(self, *, strict: bool = False) -> tuple[tuple[Site, ...], tuple[Site, ...], ExportedProgram]:
        """The rows of the model, those of its program, and the program."""
        model, args, kwargs = self.call()
        with torch.set_grad_enabled(self.gradients):
            expected = msa_compile.explain(model, *args, **kwargs).sites
            program = export(model, args, kwargs, self.sizes, strict=strict)
            return expected, msa_compile.explain(program).sites, program


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: tuple[Any, Any] = (B, T), **options: Any
) -> ExportedProgram:
    """A program with open sizes: of every tensor argument the dimensions that are as large as the tokens' are."""
    batch, length = (args[0] if args else kwargs["input_ids"]).shape
    named = {batch: sizes[0], length: sizes[1]}

    def dims(value: Any) -> dict[int, Any] | None:
        if not isinstance(value, Tensor):
            return None
        return {dim: named[size] for dim, size in enumerate(value.shape) if named.get(size) is not None}

    if kwargs:
        return torch.export.export(
            model, args, kwargs, dynamic_shapes={k: dims(v) for k, v in kwargs.items()}, **options
        )
    shapes = [dims(arg) for arg in args]
    if isinstance(model, Decoder):  # whose forward takes (ids, *extra)
        shapes = [shapes[0], *([tuple(shapes[1:])] if shapes[1:] else [])]
    return torch.export.export(model, args, dynamic_shapes=tuple(shapes), **options)


PADDED, CAUSAL, GIVEN = ("causal+padding", None), ("causal", None), ("given", None)
WINDOW = ("window(8)", Reason.SLIDING_WINDOW)


def refused(reason: Reason) -> tuple[str, Reason]:
    return ("unproved", reason)


CASES = {
    "llama": Case(ZOO["llama"].build, [PADDED] * 2),
    "gemma2": Case(ZOO["gemma2"].build, [WINDOW, PADDED]),
    "gpt_oss": Case(ZOO["gpt_oss"].build, [WINDOW, PADDED]),
    "phi3": Case(ZOO["phi3"].build, [PADDED] * 2),
    "gpt2": Case(ZOO["gpt2"].build, [PADDED] * 2),
    "bloom": Case(bloom, [refused(Reason.ATTENTION_BIAS)]),
    "bert": Case(bert, [refused(Reason.NOT_CAUSAL)]),
    "nanogpt": Case(ZOO["nanogpt"].build, [CAUSAL] * 2),
    "meta_llama": Case(ZOO["meta_llama"].build, [CAUSAL] * 2, (0,), gradients=False),
    "gpt_fast": Case(gpt_fast, [GIVEN] * 2, (torch.arange(LENGTH),), sizes=(None, T), gradients=False),
    "einsum": Case(lambda: Decoder(EinsumAttention), [CAUSAL] * 2),
    "baddbmm": Case(lambda: Decoder(BaddbmmAttention), [CAUSAL] * 2),
    "flex": Case(lambda: Decoder(FlexAttention), [CAUSAL] * 2, gradients=False),
    "padded": Case(Padded, [PADDED] * 2, (ones(2, LENGTH),)),
    "bias_buffer": Case(BiasBuffer, [refused(Reason.ATTENTION_BIAS)] * 2),
    "dropout": Case(lambda: Decoder(Dropped), [refused(Reason.DROPOUT)] * 2),
    "autocast": Case(lambda: Decoder(Autocast), [CAUSAL] * 2),
    "one_layer_twice": Case(OneLayerTwice, [CAUSAL] * 2),
}


def comparable(sites: tuple[Site, ...]) -> list[dict[str, Any]]:
    """Rows without what each capture words its own way: the line, and names of nodes in a refusal's detail."""
    return [{**dataclasses.asdict(site), "source": "", "detail": "" if site.reason else site.detail} for site in sites]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_program_has_the_rows_of_its_model(case):
    expected, found, _ = case.both()
    assert comparable(found) == comparable(expected)
    assert [(site.mask, site.reason) for site in found] == case.rows
    assert all(site.source for site in found)


def test_a_program_captured_by_dynamo_also_has_the_lines_of_the_model():
    # Otherwise export knows of a call no more than the line in the forward of its module.
    expected, found, _ = CASES["nanogpt"].both(strict=True)
    assert [site.source for site in found] == [site.source for site in expected]
    assert comparable(found) == comparable(expected)


@pytest.mark.parametrize("name", ["padded", "bias_buffer"])
def test_a_program_read_from_a_file_has_the_same_report(name):
    _, found, program = CASES[name].both()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert msa_compile.explain(torch.export.load(file)).sites == found


def run(graph: torch.fx.GraphModule, program: ExportedProgram, *given: Tensor) -> Tensor:
    """The first output of a graph that takes what its model keeps as arguments."""
    inputs = iter(given)
    kept = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    return graph(*[next(inputs) if spec.target is None else kept[spec.target] for spec in specs])[0]


@pytest.mark.parametrize("make", [WithoutGradients, lambda: Decoder(Autocast)], ids=["no_grad", "autocast"])
def test_regions_are_put_in_line_and_the_graph_computes_the_same(make):
    model = make().eval()
    program = export(model, (ids(),), {})
    assert "wrap_with" in str(program.graph)
    before = str(program.graph)
    graph = canonicalize_exported(program)
    assert str(program.graph) == before, "the program is not touched"
    assert "wrap_with" not in str(graph.graph)
    for tokens in (ids(), ids(7)):
        expected, found = model(tokens), run(graph, program, tokens)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (found, expected)]
        torch.testing.assert_close(*grads)


def test_no_assertion_on_a_computed_value_is_left_beside_an_attention():
    _, _, program = CASES["dropout"].both()
    assertion = torch.ops.aten._assert_tensor_metadata.default
    [*before] = (node for node in program.graph.nodes if node.target is assertion)
    assert before
    left = [node for node in canonicalize_exported(program).graph.nodes if node.target is assertion]
    assert all(node.args[0].op == "placeholder" for node in left)


def test_lengths_that_stay_below_a_window_show_none():
    # The program accepts no longer ones, so for it the mask is causal; the model, which accepts them, has a window.
    model, args, kwargs = CASES["gemma2"].call()
    short = {name: value[:, :5] for name, value in kwargs.items()}
    found = msa_compile.explain(export(model, args, short, (B, Dim("T", min=2, max=7)))).sites
    assert [site.mask for site in found] == ["causal+padding"] * 2


def test_include_and_exclude_and_the_report_are_as_for_a_model():
    _, _, program = CASES["padded"].both()
    report = msa_compile.explain(program, config=msa_compile.MSAConfig(exclude=("*.0",)))
    assert [site.reason for site in report.sites] == [Reason.EXCLUDED, None]
    assert not report.sparsified
    assert "not sparsified" in str(report)


def test_a_decomposed_program_and_arguments_beside_a_program_are_errors():
    _, _, program = CASES["padded"].both()
    with pytest.raises(CaptureError, match="run_decompositions"):
        msa_compile.explain(program.run_decompositions())
    with pytest.raises(ExampleInputsError, match="without arguments"):
        msa_compile.explain(program, ids())
