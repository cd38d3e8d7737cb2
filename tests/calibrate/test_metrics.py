"""Metrics of a site equal those of loops over every query, head and key."""

import math

import pytest
import torch
from runtime.tiny import llama, small, sparse, tokens
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import msa_compile
from msa_compile import MSAConfig
from msa_compile.calibrate import metrics
from msa_compile.calibrate.metrics import MetricSums, add_metrics
from msa_compile.indexer import IndexBranch
from msa_compile.observed import SiteCall

B, HKV, G, T, D, BLOCK, TOPK = 2, 2, 2, 23, 8, 4, 3


def call_of(softcap=None, padding=(0, 5)):
    generator = torch.Generator().manual_seed(1)

    def some(heads):
        return 2 * torch.randn(B, heads, T, D, generator=generator)

    return SiteCall(
        name="site",
        hidden=some(1),
        plain_query=some(HKV),
        plain_key=some(1),
        index_query=some(HKV),
        index_key=some(1),
        query=some(HKV * G),
        key=some(HKV),
        value=some(HKV),
        budget={"topk": TOPK, "local_blocks": 1, "sink_blocks": 1},
        bounds={"block_size": BLOCK, "key_start": torch.tensor(padding)},
        factors={"scale": 0.3, "softcap": softcap, "sinks": None},
    )


def softmax(logits):
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / sum(weights) for weight in weights]


def best_blocks(worth, own):
    """The forced ones, then the best."""
    forced = {own, 0}
    rest = sorted((block for block in worth if block not in forced), key=lambda block: (-worth[block], block))
    return forced | set(rest[: TOPK - len(forced)])


def naive(call, counted, stage):
    """The same numbers from nested loops."""
    kls, recalls, shares, error, energy = [], [], {"mass": [], "oracle_mass": [], "keys_mass": []}, 0.0, 0.0
    found = []
    for b in range(B):
        start = int(call.bounds["key_start"][b])
        for i in range(start, T):
            if not counted[b, i]:
                continue
            own, slots = (i - start) // BLOCK, range(start, i + 1)
            for r in range(HKV):
                heads, outputs = [], []
                for h in range(r * G, (r + 1) * G):
                    logits = [float(call.query[b, h, i] @ call.key[b, r, j]) * 0.3 for j in slots]
                    cap = call.factors["softcap"]
                    heads.append(softmax([cap * math.tanh(x / cap) for x in logits] if cap else logits))
                teacher = [sum(head[j] for head in heads) / G for j in range(len(slots))]
                scores = [float(call.index_query[b, r, i] @ call.index_key[b, 0, j]) for j in slots]
                student = softmax([score * D**-0.5 for score in scores])
                if stage == "select":
                    far = [j for j in range(len(slots)) if 0 < j // BLOCK < own]
                    pairs = [(teacher[j] ** 2, student[j]) for j in far]
                    both = [sum(column) for column in zip(*pairs, strict=True)]
                    weight = sum(teacher[j] for j in far)
                    terms = [p / both[0] * math.log(p / both[0] / (q / both[1])) for p, q in pairs]
                    kls += [weight * sum(terms)] if far else []
                else:
                    kls.append(sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True)))
                mean = call.query[b, r * G : (r + 1) * G, i].mean(0)
                by_keys = [float(mean @ call.key[b, r, j]) for j in slots]

                def by_block(values, combine, start=start, slots=slots):
                    blocks = {}
                    for j, value in zip(slots, values, strict=True):
                        blocks.setdefault((j - start) // BLOCK, []).append(value)
                    return {block: combine(found) for block, found in blocks.items()}

                mass = by_block(teacher, sum)
                mine = best_blocks(by_block(scores, max), own)
                if len(mass) > TOPK:
                    oracle = best_blocks(mass, own)
                    recalls.append(len(mine & oracle) / len(oracle))
                    far = {block for block in mass if 0 < block <= own - TOPK}
                    keys = best_blocks(by_block(by_keys, max), own)
                    largest = [block for block in far if mass[block] >= max(0.2, *(mass[b] for b in far))]
                    found += [(block in mine, block in keys) for block in largest]
                    for name, chosen in (("mass", mine), ("oracle_mass", oracle), ("keys_mass", keys)):
                        shares[name].append(sum(mass[block] for block in chosen))
                for head in heads:
                    kept = [p if (j - start) // BLOCK in mine else 0.0 for j, p in zip(slots, head, strict=True)]
                    values = [call.value[b, r, j] for j in slots]
                    dense = sum(p * value for p, value in zip(head, values, strict=True))
                    outputs = sum(p / sum(kept) * value for p, value in zip(kept, values, strict=True))
                    error += float((outputs - dense).square().sum())
                    energy += float(dense.square().sum())
    means = {name: sum(values) / len(values) for name, values in shares.items()}
    means |= {"kl": sum(kls) / len(kls), "recall": sum(recalls) / len(recalls), "decisive": len(found)}
    for place, name in enumerate(("found", "keys_found")):
        means[name] = sum(pair[place] for pair in found) / len(found)
    return {**means, "output_error": math.sqrt(error / energy), "queries": len(recalls)}


@pytest.mark.parametrize(("softcap", "workspace", "stage"), [(None, 1 << 22, "align"), (1.5, 1, "select")])
def test_metrics_equal_those_of_loops_and_padding_does_not_count(softcap, workspace, stage, monkeypatch):
    monkeypatch.setattr(metrics, "_WORKSPACE", workspace)
    call = call_of(softcap)
    counted = torch.ones(B, T, dtype=torch.bool)
    counted[0, 19:] = False  # padded on the right
    sums = MetricSums.zeros()
    add_metrics(sums, call, counted, stage)
    found, expected = sums.means(), naive(call, counted, stage)
    assert 0.1 < expected["recall"] < 0.95
    assert 0.1 < expected["found"] < 0.95
    assert 0 < expected["decisive"] < expected["queries"]
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    assert found.mass_ratio == pytest.approx(expected["mass"] / expected["oracle_mass"], rel=1e-4)
    assert found.oracle_mass > max(found.mass, found.keys_mass)


def expected_gradients(model, site, ids, rope):
    """Gradients of the divergence that autograd finds when the branch and its loss are run eagerly."""
    given = {}
    hook = site.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs, args=args), with_kwargs=True
    )
    with torch.no_grad(), msa_compile.dense(model):
        model(ids)
    hook.remove()
    hidden = given["hidden_states"] if "hidden_states" in given else given["args"][0]
    heads = site.indexer(hidden)
    q, k = (site.q_proj, site.k_proj) if rope else (site.q, site.k)
    query, key = (part(hidden).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (q, k))
    index_query, index_key = heads.query, heads.key
    if rope:
        query, key = apply_rotary_pos_emb(query, key, *given["position_embeddings"])
        index_query, index_key = apply_rotary_pos_emb(index_query, index_key, *given["position_embeddings"])
    hidden_slots = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    groups = key.shape[1]
    logits = query.unflatten(1, (groups, -1)) @ key[:, :, None].transpose(3, 4) * 8**-0.5
    teacher = logits.masked_fill(hidden_slots, -torch.inf).softmax(-1).mean(2).detach()
    scores = (index_query @ index_key.transpose(2, 3) * 8**-0.5).masked_fill(hidden_slots, -torch.inf).log_softmax(-1)
    terms = torch.where(
        hidden_slots, 0.0, torch.xlogy(teacher, teacher) - teacher * scores.masked_fill(hidden_slots, 0.0)
    )
    loss = terms.sum(-1).mean()
    return loss.item(), torch.autograd.grad(loss, site.indexer.weights())


@pytest.mark.parametrize("make", [small, pytest.param(llama, marks=pytest.mark.slow)])
def test_the_gradient_of_a_step_is_that_of_the_loss_run_eagerly(make, monkeypatch):
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    model = sparse(model, MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned"))
    site = model.layers[1].attn if make is small else model.model.layers[1].self_attn
    for part in model.modules():
        if isinstance(part, IndexBranch):
            nn.init.constant_(part.q_norm.weight, 0.1)  # a branch that was trained gets no start
    ids = tokens(37)
    loss, gradients = expected_gradients(model, site, ids, rope=make is llama)
    seen = []

    def keep(optimizer, *args):
        seen.append([parameter.grad.clone() for parameter in optimizer.param_groups[0]["params"]])

    monkeypatch.setattr(torch.optim.Adam, "step", keep)
    result = msa_compile.calibrate(model, [ids, ids], steps=1, stage="align", min_mass_ratio=0.0, progress=False)
    assert result.history[0][1] == pytest.approx(loss, rel=1e-4)
    order = [site.indexer.q_proj, site.indexer.k_proj, site.indexer.q_norm, site.indexer.k_norm]
    assert [part.weight.shape for part in order] == [entry.shape for entry in seen[0][4:]]
    for mine, theirs in zip(seen[0][4:], gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
        assert mine.abs().max() > 1e-5
