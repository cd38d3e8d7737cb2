"""An AOTInductor package computes what the sparsified model computes, in a process that has torch and none of ours."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import msa_compile
import msa_compile.kernels.given_mask
from msa_compile.errors import CaptureError, ExportFormatError, ExportMemoryError
from msa_compile.export.lint_memory import LARGEST
from msa_compile.export.package_ops import declarations

pytest.importorskip("transformers", reason="the hf extra is not installed")
from exported import BUDGET, EXACT, MAX_LENGTH, difference, sparse, tokens
from models.learned import sharpen
from models.zoo import ZOO

STEPS = 32
PROMPT = 4 * BUDGET - 3
LONG = 65536
# Loads a package without msa_compile, and runs the calls of a file.
ALONE = """
import sys
sys.modules["msa_compile"] = None
import torch
torch.set_num_threads(1)
package = torch._inductor.aoti_load_package(sys.argv[1])
calls = torch.load(sys.argv[2])
torch.save([package(*args, **kwargs) for args, kwargs in calls], sys.argv[3])
assert not hasattr(torch.ops.msa, "select_blocks")
"""


def alone(folder, path, calls):
    """What a fresh process makes of calls of a package."""
    torch.save(calls, folder / "calls.pt")
    command = [sys.executable, "-c", ALONE, str(path), str(folder / "calls.pt"), str(folder / "found.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "found.pt")


class Attention(nn.Module):
    """One causal attention, with padding or without."""

    def __init__(self, heads=8, groups=2, dim=16):
        super().__init__()
        self.groups = groups
        self.heads, self.dim = heads, dim
        self.qkv = nn.Linear(heads * dim, (heads + 2 * groups) * dim)

    def forward(self, x, keep=None):
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, length, -1, self.dim).transpose(1, 2)
            for part in self.qkv(x).split([self.heads * self.dim, *[self.groups * self.dim] * 2], -1)
        )
        mask = None
        if keep is not None:
            mask = torch.ones(length, length, dtype=torch.bool).tril() & keep.bool()[:, None, None, :]
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2).reshape(batch, length, -1)


def test_the_functions_of_a_package_have_the_arguments_of_the_operators():
    types = {"Tensor": "AtenTensorHandle", "int": "int64_t", "float": "double", "bool": "int32_t"}
    types |= {f"Optional[{name}]": f"{kind}*" for name, kind in types.items()}
    for operator, (declaration,) in declarations().items():
        expected = [types[str(argument.type)] for argument in operator._schema.arguments]
        found = declaration.split("(")[1].rstrip(")").split(", ")
        assert found == [*expected, "AtenTensorHandle*"], operator


def test_a_dtype_that_no_kernel_has_is_refused(tmp_path):
    torch.manual_seed(0)
    model = Attention().double()
    given = (torch.randn(2, 23, 128, dtype=torch.float64),)
    sparse(model, given)
    with pytest.raises(ExportFormatError, match=r"float32, bfloat16 or float16; .* is in torch\.float64"):
        msa_compile.export(model, tmp_path / "m.pt2", example_inputs=given, max_length=64)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_a_library_registered_in_python_is_refused(tmp_path):
    @torch.library.custom_op("test_aoti::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Doubled(Attention):
        def forward(self, x):
            return super().forward(torch.ops.test_aoti.twice(x))

    given = (torch.randn(2, 23, 128),)
    model = sparse(Doubled(), given)
    with pytest.raises(CaptureError, match=r"test_aoti\.twice.* registered in Python"):
        msa_compile.export(model, tmp_path / "m.pt2", example_inputs=given, max_length=64)
    assert list(tmp_path.iterdir()) == []


def test_a_package_with_dense_attention_is_not_made_for_a_long_context(tmp_path, monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Attention(), Attention()

        def forward(self, x):
            return self.second(self.first(x))

    given = (torch.randn(2, 23, 128),)
    model = sparse(Two(), given, exclude="first")
    with pytest.raises(ExportMemoryError, match="65536, 65536"):
        msa_compile.export(model, tmp_path / "m.pt2", example_inputs=given, max_length=LONG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_attention_equals_the_model_over_batch_and_length_in_a_process_of_its_own(tmp_path, dtype):
    torch.manual_seed(0)
    model = Attention().to(dtype)
    given = {"x": torch.randn(2, 23, 128, dtype=dtype), "keep": torch.ones(2, 23, dtype=torch.long)}
    sparse(model, given)
    result = msa_compile.export(model, tmp_path / "m.pt2", example_inputs=given, max_length=256)
    assert result.format == "aoti"
    assert [file.name for file in result.files] == ["m.pt2"]
    calls, expected = [], []
    for batch, length, hole in [
        (2, 1, None), (1, 4, None), (3, BUDGET, None), (2, 4 * BUDGET + 3, None), (2, 90, slice(0, 13)),
        (2, 90, slice(70, 90)), (2, 90, slice(33, 41)), (1, 90, slice(0, 90)),
    ]:  # fmt: skip
        keep = torch.ones(batch, length, dtype=torch.long)
        if hole is not None:
            keep[-1, hole] = 0
        call = {"x": torch.randn(batch, length, 128, dtype=dtype), "keep": keep}
        calls.append(((), call))
        expected.append(model(**call))
    bound = EXACT if dtype is torch.float32 else 0.05
    for (_, call), ours, theirs in zip(calls, expected, alone(tmp_path, result.path, calls), strict=True):
        assert difference(ours.float(), theirs.float()) < bound, call["keep"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cache"), [("llama", "explicit"), ("qwen3", "static")])
def test_a_package_decodes_through_its_caches_as_the_model_does(tmp_path, name, cache):
    entry = ZOO[name]
    model = sparse(entry.build(), indexer="learned")
    sharpen(model)
    given = {"input_ids": tokens(2, 23)}
    result = msa_compile.export(model, tmp_path / "m.pt2", example_inputs=given, cache=cache, max_length=MAX_LENGTH)
    assert result.largest < LARGEST
    ids = tokens(2, PROMPT + STEPS)
    feed = entry.calls.start(model, "static" if cache == "static" else "dynamic", 2, MAX_LENGTH)
    package = torch._inductor.aoti_load_package(str(result.path))
    shapes = {port.name: port.shape for port in result.inputs}
    length = MAX_LENGTH if cache == "static" else 0

    def empty(kind):
        names = [port for port in shapes if port.endswith(f".{kind}")]
        return [torch.zeros(2, shapes[port][1], length, shapes[port][3]) for port in names]

    past = [list(pair) for pair in zip(empty("key"), empty("value"), strict=True)]
    index_keys = empty("index_key")
    addresses = [state.data_ptr() for layer in past for state in layer]
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
        piece = ids[:, start:end].contiguous()
        where = torch.full((2,), start) if cache == "static" else None
        (logits, *states), index_keys = package(piece, where, past, index_keys=index_keys)
        past = [states[at : at + 2] for at in range(0, len(states), 2)]
        assert difference(feed(piece)[:, -1:], logits) < EXACT, start
    if cache == "static":
        assert [state.data_ptr() for state in states] == addresses, "a step copies no cache"
