"""Sparse programs of tiny models, captured and not written."""

import functools

import torch
from exported import BLOCK_SIZE, TOPK, tokens
from models.zoo import ZOO

from msa_compile import MSAConfig
from msa_compile.export.capture import capture
from msa_compile.export.plan_call import Request, plan_call
from msa_compile.export.records import SparseProgram

CONFIG = MSAConfig(block_size=BLOCK_SIZE, topk_blocks=TOPK, dense_below=0)


@functools.cache
def program_of(
    name: str, cache: str = "none", *, padded: bool = False, max_length: int = 64, config: MSAConfig = CONFIG
) -> SparseProgram:
    ids = tokens(2, 23)
    model = ZOO[name].build()
    is_transformers = hasattr(model, "config")
    given = {"input_ids": ids} if is_transformers else {}
    if padded:
        given["attention_mask"] = torch.ones_like(ids)
    request = Request(
        model=model,
        args=() if is_transformers else (ids,),
        kwargs=given,
        config=config,
        windows={},
        sites=(),
        dynamic_shapes=None,
        cache=cache,
        max_length=max_length,
    )
    with torch.no_grad():
        return capture(plan_call(request), config, {}, ())
