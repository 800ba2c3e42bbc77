"""Where it is not plain eager training, a converted model computes what the stock model does, or is refused by name."""

import copy
import io
import threading
import types
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from elsewhere_cases import CONVS, EVERY, EXACT, images, pair
from references import random_tensor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor

import lowrank
from lowrank import ASI, HOSVD, Vanilla


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.tag)
def test_without_gradients_it_is_the_stock_model_bit_for_bit(method, mode):
    stock, model = pair(method)
    with mode():
        y = model(images())
        assert torch.equal(y, stock(images()))
    assert type(y) is torch.Tensor
    assert y.is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.tag)
def test_jit_trace(method):
    stock, model = pair(method)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            traced = torch.jit.trace(model, (images(),))
        file = io.BytesIO()
        torch.jit.save(traced, file)  # which a node of Python's own would not let happen
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(images(5, seed=1)), stock(images(5, seed=1)))


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.tag)
def test_a_graph_of_operators_is_the_stock_one(method):
    stock, model = pair(method)
    graphs = [make_fx(network.__call__)(images()) for network in (stock, model)]
    operators = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    assert operators[1] == operators[0]
    torch.testing.assert_close(graphs[1](images(seed=1)), stock(images(seed=1)))


@pytest.mark.parametrize("method", [Vanilla(), ASI(2)], ids=lambda method: method.tag)
@pytest.mark.slow
def test_export(method):
    stock, model = pair(method)
    program = torch.export.export(model.eval(), (images(),))
    torch.testing.assert_close(program.module()(images(seed=1)), stock.eval()(images(seed=1)))


@pytest.mark.parametrize("method", [Vanilla(), HOSVD(1.0)], ids=lambda method: method.tag)
def test_symbolic_tracing_and_feature_extraction(method):
    """Converted layers are leaves, as stock ones are, and a graph of them trains as they do."""
    stock, model = pair(method)
    graph, stock_graph = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(stock)
    assert [node.target for node in graph.graph.nodes] == [node.target for node in stock_graph.graph.nodes]
    for network in (stock, graph):
        network(images()).square().sum().backward()
    torch.testing.assert_close(graph.conv.weight.grad, stock.conv.weight.grad)
    nodes = {"norm": "a", "first": "b"}
    found, expected = (create_feature_extractor(network, nodes)(images()) for network in (model, stock))
    torch.testing.assert_close(found, expected)


def test_a_graph_module_is_converted_and_copied_and_recompiled():
    """As `create_feature_extractor` makes; what is done to its class afterwards is its own."""
    stock = pair(Vanilla())[0].eval()
    for make in (torch.fx.symbolic_trace, lambda net: create_feature_extractor(net, {"second": "out"})):
        graph = make(copy.deepcopy(stock))
        expected = graph(images())
        lowrank.convert(graph, ["conv", "first"], HOSVD(1.0))
        twin = copy.deepcopy(graph)
        for network in (graph, twin):
            getattr(network, "recompile", lambda: None)()
            network.train().eval()
            torch.testing.assert_close(network(images()), expected)
        lowrank.revert(twin)
        torch.testing.assert_close(twin(images()), expected)


def squares(f):
    return lambda weights, x: f(weights, x).square().sum()


SMALL = (slice(1), slice(None), slice(6), slice(6))
TRANSFORMS = {
    "grad": lambda f, w, x: grad(squares(f))(w, x),
    "per sample": lambda f, w, x: vmap(grad(lambda w, one: squares(f)(w, one[None])), (None, 0))(w, x),
    "vjp": lambda f, w, x: vjp(squares(f), w, x)[1](torch.tensor(1.5, dtype=x.dtype)),
    "jvp": lambda f, w, x: jvp(lambda x: f(w, x), (x,), (images(seed=1),)),
    "jacrev": lambda f, w, x: jacrev(f, 1)(w, x),
    "jacfwd": lambda f, w, x: jacfwd(f, 1)(w, x[SMALL]),
    "hessian": lambda f, w, x: hessian(squares(f), 1)(w, x[SMALL]),
}


@pytest.mark.parametrize("method", EXACT, ids=lambda method: method.tag)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(transform, method):
    results = []
    for network in pair(method, [*CONVS, "first", "second"]):
        weights = {name: p.detach() for name, p in network.named_parameters()}
        call = partial(functional_call, network)
        results.append(TRANSFORMS[transform](lambda w, x, call=call: call(w, (x,)), weights, images()))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("method", EXACT, ids=lambda method: method.tag)
def test_forward_mode(method):
    results = []
    for network in pair(method):
        with fwAD.dual_level():
            y = fwAD.unpack_dual(network(fwAD.make_dual(images(), images(seed=1))))
            results.append([y.primal, y.tangent])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.tag)
def test_where_saved_tensors_may_be_changed(method):
    """The context copies what an operator is about to change, if something saved it."""
    gradients = []
    for network in pair(method):
        x = images().requires_grad_()
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            given = x * 1
            y = network(given)
            loss = F.relu(y, inplace=True).square().sum()
            with torch.no_grad():
                for tensor in (given, *network.parameters()):
                    tensor.zero_()
            loss.backward()
        gradients.append([x.grad, *(parameter.grad for parameter in network.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.tag)
def test_fake_tensors_give_shapes_and_leave_nothing_behind(method):
    """A memory estimate ahead of training must not spoil the training, of this model nor of another."""
    stock, model = pair(HOSVD(1.0))
    probe = pair(method)[1]
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = probe(torch.empty(5, 3, 8, 8, dtype=torch.float64))
        y.sum().backward()
        assert y.shape == (5, 2)
    probe.zero_grad()
    reference = pair(method)[1]
    for network in (stock, model, probe, reference):
        network(images()).square().sum().backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
        torch.testing.assert_close(probe.get_parameter(name).grad, reference.get_parameter(name).grad)


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.tag)
def test_meta_tensors(method):
    model = pair(method)[1].to("meta")
    x = images().to("meta").requires_grad_()
    y = model(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape, y.device.type) == ((2, 2), x.shape, "meta")


def test_a_scripted_part():
    stock, model = pair(HOSVD(1.0))
    for network in (stock, model):
        network.norm = torch.jit.script(lowrank.revert(copy.deepcopy(network)).norm)
        network.last = torch.jit.script(lowrank.revert(copy.deepcopy(network)).last)
        network(images()).square().sum().backward()
    torch.testing.assert_close(model.conv.weight.grad, stock.conv.weight.grad)


# Unusual numbers


@pytest.mark.parametrize("method", [Vanilla(), ASI(99), HOSVD(1.0)], ids=lambda method: method.tag)
def test_complex_weights_are_refused_and_complex_inputs_are_stock(method):
    model = nn.Sequential(nn.Linear(4, 3, dtype=torch.complex128))
    with pytest.raises(lowrank.ConversionError, match=r"complex128.*real"):
        lowrank.convert(model, ["0"], method)
    assert type(model[0]) is nn.Linear
    x = torch.complex(random_tensor(5, 4), random_tensor(5, 4, seed=1)).requires_grad_()
    for names in (["2"], ["0", "2"]):
        stock = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
        late = lowrank.convert(copy.deepcopy(stock), names, method)
        for network in (stock, late):  # which becomes complex after the conversion
            network[0].to(torch.complex128)
            y = network[0](x)
            y.backward(torch.complex(random_tensor(5, 4, seed=2), random_tensor(5, 4, seed=3)))
        torch.testing.assert_close(late[0].weight.grad, stock[0].weight.grad)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("names", [["2"], ["0", "2"]])
def test_sparse_inputs(names, layout):
    stock = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    model = lowrank.convert(copy.deepcopy(stock), names, HOSVD(1.0))
    x = random_tensor(5, 6).relu().to_sparse(layout=layout)
    for network in (stock, model):
        network(x).square().sum().backward()
    for (_, found), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_nested_inputs():
    stock = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LayerNorm(3)).double()
    model = lowrank.convert(copy.deepcopy(stock), ["0"], HOSVD(1.0))
    rows = [random_tensor(2, 4), random_tensor(5, 4, seed=1)]
    outputs = [network(torch.nested.nested_tensor(rows, layout=torch.jagged)) for network in (stock, model)]
    for found, expected in zip(outputs[1].unbind(), outputs[0].unbind(), strict=True):
        torch.testing.assert_close(found, expected)


class Marked(torch.Tensor):
    """A user's own kind of tensor."""


@pytest.mark.parametrize("method", EXACT, ids=lambda method: method.tag)
def test_a_users_own_kind_of_tensor(method):
    results = []
    for network in pair(method):
        y = network(images().as_subclass(Marked))
        y.square().sum().backward()
        results.append((y, network.conv.weight.grad))
    assert type(results[1][0]) is type(results[0][0]) is Marked
    torch.testing.assert_close(results[1][1], results[0][1])


def test_an_output_meets_a_users_own_kind_of_tensor():
    scale = torch.ones(1, dtype=torch.float64).as_subclass(Marked)
    for network in pair(Vanilla()):
        for place in (network.conv, network):
            assert type(place(images()) * scale) is Marked
            assert type(scale * place(images())) is Marked


def test_an_output_becomes_a_parameter():
    """As where a prompt or an image is learned, from a first value that the network gives."""
    for network in pair(Vanilla()):
        for place in (network.conv, network):
            parameter = nn.Parameter(place(images()))
            assert isinstance(parameter, nn.Parameter)
            assert (parameter.is_leaf, parameter.requires_grad) == (True, True)


@pytest.mark.cpu_only("PyTorch quantises no layer of a GPU")
@pytest.mark.parametrize("quantised", ["0", "1"])
def test_dynamic_quantisation_of_a_part(quantised):
    engines = torch.backends.quantized.supported_engines
    if not {"fbgemm", "onednn", "x86"} & set(engines):
        pytest.skip("this build of PyTorch quantises nothing")
    stock = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.LayerNorm(4))
    model = lowrank.convert(copy.deepcopy(stock), ["0", "1"], Vanilla())
    lowrank.revert(model.get_submodule(quantised))
    outputs = [
        torch.ao.quantization.quantize_dynamic(network, {quantised}, torch.qint8)(torch.ones(3, 6))
        for network in (stock, model)
    ]
    torch.testing.assert_close(outputs[1], outputs[0])


# Code of the model's own


@pytest.mark.parametrize("smallest", [0, 2**40])
@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_a_forward_set_on_the_instance(name, smallest):
    """As offloading and quantisation hooks do, or for circular padding; also on a layer that nobody names."""

    def doubled(self, x, *_):
        return F.conv2d(x, 2 * self.weight, self.bias)

    for when in ("before", "after"):
        stock, model = pair(Vanilla(), ["last"])
        lowrank.revert(model)
        if when == "after":
            lowrank.convert(model, ["last"], HOSVD(1.0), smallest=smallest)
            model(images())
        for network in (stock, model):
            setattr(network.conv, name, types.MethodType(doubled, network.conv))
        if when == "before":
            with pytest.raises(lowrank.ConversionError, match="forward of its own"):
                lowrank.convert(model, ["conv"], HOSVD(1.0))
            lowrank.convert(model, ["last"], HOSVD(1.0), smallest=smallest)
        for network in (stock, model, stock, model):
            network(images()).square().sum().backward()
        for (_, found), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad)


def test_a_forward_set_on_the_model():
    def reads_twice(self, x):
        y = self.conv(x)
        return self.norm(y).relu() + y

    stock, model = pair(HOSVD(1.0))
    for network in (stock, model):
        network.forward = types.MethodType(reads_twice, network)
        network(images()).square().sum().backward()
    torch.testing.assert_close(model.conv.weight.grad, stock.conv.weight.grad)


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("training", [False, True])
def test_threads_get_the_stock_output(training):
    stock, model = pair(Vanilla())
    problems = []
    expected = [stock(images(seed=seed)).detach() for seed in range(4)]

    def work(seed):
        try:
            for _ in range(20):
                with torch.set_grad_enabled(training):
                    torch.testing.assert_close(model(images(seed=seed)).detach(), expected[seed])
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
