"""Law 7 past Dynamo's recompile limit: many models, many lengths, many modes, several threads."""

import threading

import torch

import msa_compile
from runtime.tiny import CONFIG, LAYERS, OpCount, small, sparse, tokens


def test_twelve_models_of_one_class_are_all_sparse(ops: OpCount):
    ids = tokens()
    with torch.no_grad():
        for seed in range(12):
            model = msa_compile.sparsify(small("", seed=seed), CONFIG, inner="eager")  # one layer
            model(ids)
            assert ops.take() == 1, seed
            assert msa_compile.explain(model).dense_calls == 0


def test_one_model_at_fourteen_lengths_is_sparse_with_few_graphs(ops: OpCount):
    model = sparse(small())
    with torch.no_grad():
        for length in range(5, 33, 2):
            model(tokens(length, batch=1 + length % 3))
            assert ops.take() == LAYERS, length
    assert msa_compile.explain(model).graphs <= 3  # one, and one more where the batch is 1
    assert msa_compile.explain(model).dense_calls == 0


def test_grad_modes_mix(ops: OpCount):
    model, ids = sparse(small()), tokens()
    outs = []
    for _ in range(2):
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                outs.append(model(ids))
            assert ops.take() == LAYERS, mode
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert [out.requires_grad for out in outs[:3]] == [False, False, True]
    assert [out.is_inference() for out in outs[:3]] == [False, True, False]
    assert msa_compile.explain(model).dense_calls == 0


def test_two_threads_may_call_one_model(ops: OpCount):
    model = msa_compile.sparsify(small(), CONFIG, inner="eager")  # found at the first call, which both make
    ids = [tokens(length, seed=length) for length in (21, 30)]
    results: dict[tuple[int, int], torch.Tensor] = {}
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for turn in range(3):
                    results[index, turn] = model(ids[index])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert ops.take() == 6 * LAYERS
    assert msa_compile.explain(model).dense_calls == 0
    for (index, _), result in results.items():
        torch.testing.assert_close(result, model(ids[index]).detach())
