"""Functions that keep less take every argument that PyTorch's take, however it is given."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank
from lowrank.exact.watched import Watched


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)

    def forward(self, x):
        return F.relu(self.norm(self.linear(x)))


def room():
    return torch.empty(0, dtype=torch.float64)


INTO = {
    "pow": lambda x, y: torch.pow(x, 2, out=y),
    "softmax": lambda x, y: torch.softmax(x, -1, out=y),
    "sigmoid": lambda x, y: torch.sigmoid(x, out=y),
    "tanh": lambda x, y: torch.tanh(x, out=y),
    "mul": lambda x, y: torch.mul(x, x, out=y),
    "matmul": lambda x, y: torch.matmul(x, x, out=y),
    "add": lambda x, y: torch.add(x, x, alpha=2, out=y),
    "sub": lambda x, y: torch.sub(x, x, alpha=2, out=y),
    "div": lambda x, y: torch.div(x, 2, rounding_mode="floor", out=y),
    "neg": lambda x, y: torch.neg(x, out=y),
    "cat": lambda x, y: torch.cat([x, x], out=y),
    "stack": lambda x, y: torch.stack([x, x], out=y),
    "addcmul": lambda x, y: torch.addcmul(x, x, x, value=2, out=y),
    "normalize": lambda x, y: F.normalize(x, out=y),
}
CALLS = {
    "pow by name": lambda x: torch.pow(exponent=2, input=x),
    "pow of a number": lambda x: 2**x,
    "pow of a tensor": lambda x: torch.pow(torch.tensor(2.0), x),
    "softmax by name": lambda x: torch.softmax(input=x, dim=-1, dtype=torch.float32),
    "softmax in order": lambda x: F.softmax(x, -1, 3, torch.float32),
    "addcmul by name": lambda x: torch.addcmul(tensor2=x * 2, input=x, tensor1=x, value=0.5),
    "addcmul with its value between": lambda x: torch.addcmul(x, 0.5, x, x * 2),
    "addcmul in part by name": lambda x: torch.addcmul(x, x, tensor2=x * 2),
    "einsum of a list": lambda x: torch.einsum("ij,jk", [x, x]),
    "einsum of places": lambda x: torch.einsum(x, [0, 1], x, [1, 2], [0, 2]),
    "matmul by name": lambda x: torch.matmul(input=x, other=x.T),
    "mul by name": lambda x: torch.mul(other=x.T, input=x),
    "attention by name": lambda x: F.scaled_dot_product_attention(query=x[None], value=x[None], key=x[None] * 2),
    "layer_norm by name": lambda x: F.layer_norm(input=x, normalized_shape=[3], eps=1e-3),
    "relu by name": lambda x: F.relu(inplace=False, input=x - 1),
    "dropout in order": lambda x: F.dropout(x, 0.5, False, False),
    "chunk by name": lambda x: torch.chunk(dim=0, input=x, chunks=2)[1],
    "pad by name": lambda x: F.pad(x[None], mode="reflect", pad=(1, 1)),
    "repeat_interleave of a tensor": lambda x: x.repeat_interleave(torch.tensor([1, 2, 0]), dim=0),
}


def watched():
    torch.manual_seed(0)
    model = lowrank.convert(Net().double(), ["linear"], lowrank.Vanilla())
    x = model(torch.randn(3, 3, dtype=torch.float64))
    assert type(x) is Watched
    return x


@pytest.mark.parametrize("name", INTO)
def test_a_result_is_written_where_it_is_asked_for(name):
    x, y, wanted = watched(), room(), room()
    with torch.no_grad():
        found = INTO[name](x, y)
        INTO[name](x.as_subclass(torch.Tensor), wanted)
    torch.testing.assert_close(y, wanted)
    assert found is y or name == "normalize"


@pytest.mark.parametrize("name", INTO)
def test_with_a_gradient_it_is_written_or_refused_as_by_pytorch(name):
    x, y, wanted = watched(), room(), room()
    try:
        INTO[name](x.as_subclass(torch.Tensor), wanted)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:30])):
            INTO[name](x, y)
    else:
        INTO[name](x, y)
        torch.testing.assert_close(y, wanted)


@pytest.mark.filterwarnings("ignore:This overload of addcmul is deprecated")
@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_taken_in_any_way(name):
    x = watched()
    plain = x.detach().as_subclass(torch.Tensor).requires_grad_()
    y, wanted = CALLS[name](x), CALLS[name](plain)
    grad = torch.randn_like(wanted)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), wanted)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(wanted, plain, grad))
