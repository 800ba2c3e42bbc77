"""ASI on inputs so large that bases are iterated on a part: which part is in turn is training state."""

import copy
from contextlib import nullcontext

import pytest
import torch
from layer_cases import assert_equal_states, step, whole_state
from references import random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI
from lowrank.kernels import library
from lowrank.tensors.sample import share_of

SHAPE, RANKS = (32, 27, 24, 20), (4, 8, 3, 3)
METHODS = [
    ASI(RANKS),
    ASI(RANKS, storage="int8"),
    ASI(RANKS, refresh=2),
    ASI(RANKS, refresh="energy", storage="int8"),
    ASI(RANKS, warm_start=False),
]
COUNT = f"0.bases.{2 * len(SHAPE) + 1}"


def model_of(method):
    torch.manual_seed(0)
    return lowrank.convert(nn.Sequential(nn.Conv2d(27, 4, 3)), ["0"], method)


def batch(seed, shape=SHAPE):
    return random_tensor(*shape, seed=seed).float()


@pytest.fixture(params=[True, False], ids=["compiled", "operators"])
def kernels(request):
    with nullcontext() if request.param else library.plain():
        yield


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_resumed_run_goes_on_with_the_part_in_turn(method, kernels):
    model = model_of(method)
    for seed in range(3):
        step(model, batch(seed))
    resumed = model_of(method)
    resumed.load_state_dict(model.state_dict())
    lowrank.load_training_state(resumed, lowrank.training_state(model))
    for seed in range(3, 6):
        torch.testing.assert_close(step(resumed, batch(seed)), step(model, batch(seed)), rtol=0, atol=0)
    assert_equal_states(whole_state(resumed), whole_state(model))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_state_of_a_run_that_did_not_count_goes_on_from_the_first_part(method):
    model = model_of(method)
    for seed in range(3):
        step(model, batch(seed))
    state = lowrank.training_state(model)
    assert state.pop(COUNT).item() == 3
    lowrank.load_training_state(model, state)
    step(model, batch(3))
    assert lowrank.training_state(model)[COUNT].item() == 1


def test_each_pass_in_training_has_another_part(kernels):
    x = batch(0)
    start = [None, None, None, random_tensor(20, 3).float()]
    share = share_of(SHAPE, 3, 3)
    model = model_of(ASI((99, 99, 99, 3)))
    found = []
    for _ in range(share):
        bases = model[0]._lowrank.bases
        model[0]._lowrank.bases = (*start, *bases[4:])  # from the same start
        step(model, x)
        found.append(model[0]._lowrank.bases[3])
    assert not any(torch.equal(one, other) for at, one in enumerate(found) for other in found[:at])
    before = lowrank.training_state(model)
    model.eval()
    model(x)
    with torch.no_grad():
        model.train()(x)
    assert_equal_states(lowrank.training_state(model), before)


@pytest.mark.parametrize("shape", [(7, 27, 24, 20), (7, 27, 6, 5)], ids=["another large one", "a small one"])
def test_a_smaller_batch_between_keeps_the_count(shape):
    model = model_of(ASI(RANKS))
    step(model, batch(0))
    step(model, batch(1, shape))
    step(model, batch(2))
    large = shape[0] * shape[1] * shape[2] * shape[3] >= 2**18
    assert lowrank.training_state(model)[COUNT].item() == 2 + large


def test_small_inputs_and_the_published_algorithm_have_nothing_to_count():
    for method, shape in ((ASI(RANKS), (7, 27, 6, 5)), (ASI(RANKS, algorithm="published"), SHAPE)):
        model = model_of(method)
        step(model, batch(0, shape))
        assert COUNT not in lowrank.training_state(model)


def test_computed_again_in_the_backward_pass_it_is_that_of_a_pass_of_its_own(kernels):
    model, x = model_of(ASI(RANKS)), batch(0)
    twice = copy.deepcopy(model)
    for _ in range(3):
        y = checkpoint(model, x, use_reentrant=False)
        y.backward(random_tensor(*y.shape).float())
        twice(x)
        step(twice, x)
    assert_equal_states(lowrank.training_state(model), lowrank.training_state(twice))
    assert lowrank.training_state(model)[COUNT].item() == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[:4], ids=str)
def test_in_a_compiled_graph_which_is_made_once_parts_take_turns_as_without(method):
    torch._dynamo.reset()
    model = model_of(method)
    twin, fast = copy.deepcopy(model), torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(5):
        settled = torch._dynamo.config.patch(error_on_recompile=True) if seed > 1 else nullcontext()
        with settled:
            found = step(fast, batch(seed))
        expected = step(twin, batch(seed))
        assert_equal_states(lowrank.training_state(model), lowrank.training_state(twin))
        found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert lowrank.training_state(model)[COUNT].item() == 5
