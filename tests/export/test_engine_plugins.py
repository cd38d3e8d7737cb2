"""Shapes, PTX and signatures of the plugins, without TensorRT and without a GPU."""

import inspect
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("onnx", reason="the onnx extra is not installed")
from msa_compile.export.engine.entries import SHARED_MEMORY, entry_of, lists_of
from msa_compile.export.engine.plugins import PLUGINS
from msa_compile.kernels.chip import CHIPS

BATCH, HEADS, GROUPS, QUERIES, KEYS, DIM = 2, 16, 4, 100, 1000, 128
SHAPES = {
    "query": (BATCH, HEADS, QUERIES, DIM),
    "key": (BATCH, GROUPS, KEYS, DIM),
    "value": (BATCH, GROUPS, KEYS, DIM),
    "index_query": (BATCH, GROUPS, QUERIES, DIM),
    "index_key": (BATCH, GROUPS, KEYS, DIM),
    "scores": (BATCH, GROUPS, 8, QUERIES),
    "block_ids": (BATCH, GROUPS, QUERIES, 16),
    "query_start": (BATCH,),
    "key_start": (BATCH,),
    "key_visible": (BATCH, KEYS),
    "lengths": (2,),
    "sinks": (HEADS,),
}
NUMBERS = {
    "block_size": 128,
    "topk": 16,
    "local_blocks": 1,
    "sink_blocks": 0,
    "scale": 0.1,
    "softcap": 30.0,
    "heads": HEADS,
    "groups": GROUPS,
    "key_heads": GROUPS,
    "head_dim": DIM,
    "most_blocks": 512,
}


def numbers_of(plugin, chip=CHIPS[90], *, flags=1, item_size=2):
    queries, size = lists_of(NUMBERS, 16, item_size, chip)
    known = NUMBERS | {"queries_a_tile": queries, "list_size": size, "is_padded": flags, "is_positioned": flags}
    return {name: known[name] for name in plugin.numbers}


def dtypes_of(plugin, floating):
    kinds = {
        "scores": "float32",
        "query_start": "int64",
        "key_start": "int64",
        "lengths": "int64",
        "key_visible": "bool",
    }
    kinds |= dict.fromkeys(("block_ids", "starts", "members", "counts"), "int32")
    return [kinds.get(name, floating) for name in plugin.tensors]


class Expression:
    """A size as TensorRT has it: it adds, multiplies and divides itself, and nothing else does it with it."""

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return Expression(self.value + getattr(other, "value", other))

    def __mul__(self, other):
        return Expression(self.value * getattr(other, "value", other))

    def __floordiv__(self, other):
        return Expression(self.value // getattr(other, "value", other))


def evaluated(shape):
    return tuple(getattr(size, "value", size) for size in shape)


@pytest.mark.parametrize("name", ["SelectBlocks", "BlockSparseAttention", "BlockSparseAttentionSoftcappedWithSinks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_plugin_says_comes_out_is_what_the_op_of_the_package_gives(name, dtype):
    plugin = PLUGINS[name]
    shapes = {tensor: [Expression(size) for size in SHAPES[tensor]] for tensor in plugin.tensors}
    (out,) = plugin.outputs(shapes, numbers_of(plugin))
    with FakeTensorMode():
        tensors = {
            tensor: torch.empty(SHAPES[tensor], dtype=getattr(torch, kind))
            for tensor, kind in zip(plugin.tensors, dtypes_of(plugin, dtype), strict=True)
        }
        if name == "SelectBlocks":
            theirs = torch.ops.msa.select_blocks(tensors["index_query"], tensors["index_key"], 128, 16)
        else:
            parts = [tensors[part] for part in ("query", "key", "value", "block_ids")]
            theirs = torch.ops.msa.block_sparse_attention(*parts, 128, 0.1)
        ours = plugin.op(*tensors.values(), *numbers_of(plugin).values())
    assert evaluated(out.shape) == tuple(theirs.shape) == tuple(ours.shape)
    said = str(tensors[out.dtype].dtype).removeprefix("torch.") if out.dtype in tensors else out.dtype
    assert said == str(theirs.dtype).removeprefix("torch.") == str(ours.dtype).removeprefix("torch.")


@pytest.mark.parametrize("capability", [80, 90])
def test_what_lies_between_two_launches_has_the_shape_that_the_kernels_write(capability):
    from msa_compile.kernels.block_sparse_attention.triton import find_launches as attention_launches
    from msa_compile.kernels.select_blocks.triton import find_launches as selection_launches

    chip = CHIPS[capability]
    rows = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in SHAPES.items()}
    ids = torch.empty(SHAPES["block_ids"], dtype=torch.int32, device="meta")
    nothing = dict.fromkeys(("query_start", "key_start", "key_end", "document_start", "mask"))
    select = list(selection_launches(rows["index_query"], rows["index_key"], ids, block_size=128, local_blocks=1,
                                     sink_blocks=0, is_causal=True, chip=chip, **nothing))  # fmt: skip
    more = {"scale": 0.1, "softcap": None, "sinks": None, "window": None, "is_causal": True, "chip": chip}
    attend = list(attention_launches(rows["query"], rows["key"], rows["value"], ids, rows["query"], block_size=128,
                                     **more, **nothing))  # fmt: skip
    assert [launch.kernel.__name__ for launch in select + attend] == [
        "score_blocks", "choose_blocks", "list_blocks", "attend_tiles"
    ]  # fmt: skip
    scores = PLUGINS["ScoreBlocks"].outputs(SHAPES, numbers_of(PLUGINS["ScoreBlocks"]))[0]
    written = select[0].arguments["scores"]
    assert (BATCH * GROUPS, *scores.shape[2:]) == tuple(written.shape)
    assert scores.dtype == str(written.dtype).removeprefix("torch.")
    numbers = numbers_of(PLUGINS["ListBlocks"], chip)
    starts, members, counts = PLUGINS["ListBlocks"].outputs(SHAPES, numbers)
    assert starts == members
    assert counts.shape == starts.shape[:3]
    assert starts.shape[2] == -(-QUERIES // numbers["queries_a_tile"])
    # A GPU has larger tiles, and asks for no more places than there are blocks: 8.
    listed, queries = attend[0].arguments["starts"], attend[0].tile.sizes["QUERIES"]
    assert starts.shape[3] // numbers["queries_a_tile"] == 16
    assert listed.shape[2] // queries == 8


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name", ["ScoreBlocks", "ChooseBlocks", "ListBlocks", "AttendBlocks", "AttendBlocksSoftcappedWithSinks"]
)
def test_a_launch_compiles_to_ptx_that_takes_tensors_and_nothing_else(name, capability, tmp_path):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if triton.knobs.runtime.interpret:
        pytest.skip("kernels are interpreted in this process")
    from msa_compile.export.engine.ptx import compile_entry

    # One chip compiles what is plain, the other what has everything.
    flags, floating = (1, "float16") if capability == 80 else (0, "bfloat16")
    plugin, chip = PLUGINS[name], CHIPS[capability]
    numbers = numbers_of(plugin, chip, flags=flags)
    shapes = {tensor: [Expression(size) for size in SHAPES.get(tensor, ())] for tensor in plugin.tensors}
    entry = entry_of(plugin, shapes, numbers, 2, chip)
    inputs = dtypes_of(plugin, floating)
    outputs = [out.dtype for out in plugin.outputs(SHAPES, numbers)]
    made = compile_entry(entry, inputs, [floating if each == "query" else each for each in outputs], chip)
    assert made.parameters == ("u64",) * (len(inputs) + plugin.results)
    assert f".entry {made.name}(" in made.ptx
    assert made.threads == entry.tile.warps * 32
    assert made.shared <= SHARED_MEMORY
    assert all(isinstance(size, Expression) for size in entry.grid[:2])
    # What the assembler of the driver would say of it.
    path = tmp_path / "kernel.ptx"
    path.write_text(made.ptx)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    arch = {80: "sm_80", 90: "sm_90a"}[capability]
    said = subprocess.run([assembler, f"-arch={arch}", path, "-o", tmp_path / "out"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


def test_scratch_memory_that_a_kernel_uses_is_not_dropped():
    from msa_compile.export.engine.ptx import drop_scratch

    ptx = (
        ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{ ld.param.u64 %rd1, [k_param_1]; }"
    )
    assert drop_scratch(ptx, "k", 2).count("k_param_1") == 2
    with pytest.raises(AssertionError, match="scratch memory"):
        drop_scratch(ptx, "k", 1)
    cut = drop_scratch(ptx.replace("k_param_1]", "k_param_0]"), "k", 1)
    assert "k_param_1" not in cut
    assert "k_param_0\n)" in cut


def test_plugins_are_called_like_the_nodes_of_an_onnx_export():
    from msa_compile.export.onnx_functions import attention_function, select_blocks_function

    bodies = [select_blocks_function(23)]
    bodies += [attention_function(23, softcap=softcap, sinks=sinks) for softcap in (0, 1) for sinks in (0, 1)]
    for body in bodies:
        plugin = PLUGINS[body.name]
        assert tuple(body.input) == plugin.tensors
        assert set(body.attribute) == set(plugin.numbers)
        assert plugin.is_python
    assert {body.name for body in bodies} == {name for name, plugin in PLUGINS.items() if plugin.is_python}


def test_a_function_of_a_plugin_has_the_signature_that_tensorrt_reads():
    from msa_compile.export.engine.register import _with_signature

    plugin = PLUGINS["ScoreBlocks"]
    seen = []
    called = _with_signature(plugin, lambda *args: seen.append(args), int, {"outputs": tuple[int], "tactic": int}, None)
    signature = inspect.signature(called)
    assert list(signature.parameters) == [*plugin.tensors, *plugin.numbers, "outputs", "tactic"]
    assert all(signature.parameters[name].annotation is int for name in plugin.tensors)
    count = len(signature.parameters)
    called(*range(count - 1), tactic=count - 1)
    assert seen == [tuple(range(count))]


def test_the_check_exits_with_2_and_says_what_to_install_where_no_engine_can_be_built(capsys):
    if torch.cuda.is_available():
        pytest.skip("engines may be built here")
    from msa_compile.export.check_tensorrt import main

    assert main([]) == 2
    assert "'torch-tensorrt==2.13.*'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_check_goes_as_far_as_it_can_without_tensorrt(capsys):
    pytest.importorskip("triton", reason="triton is not installed")
    from msa_compile.export.check_tensorrt import main

    assert main(["--dry-run", "--length", "300", "--dtypes", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert said.count("8 kernels compiled") == 2 * 2, "each row once as it is made, once in the table"
    assert "FAILED" not in said
