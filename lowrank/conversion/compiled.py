"""Parts of a model that are compiled on their own: a compiler takes ordinary tensors alone.

So each has a door, at which what eager training hands it is made ordinary: what is unread is computed, and what is
watched or held is given as PyTorch's own class. Ahead of it and behind it tensors are as they are in any eager model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lowrank.exact.watched import Watched
from lowrank.layers.held import let_go
from lowrank.layers.lazy import Lazy, real


def open_doors(model: nn.Module) -> None:
    """Give a door to each module that is compiled on its own, also where it lies in another: both may be called."""
    close_doors(model)
    for module in model.modules():
        if module._compiled_call_impl is not None:  # hooks are within what is compiled
            module._compiled_call_impl = partial(_through_a_door, module._compiled_call_impl)
        elif _has_compiled_forward(module):  # hooks run ahead of it, and are copied with the module
            module.register_forward_pre_hook(_door, prepend=True, with_kwargs=True)


def close_doors(model: nn.Module) -> None:
    """Take all of them away."""
    for module in model.modules():
        call = module._compiled_call_impl
        if isinstance(call, partial) and call.func is _through_a_door:
            module._compiled_call_impl = call.args[0]
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _door]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _has_compiled_forward(module: nn.Module) -> bool:
    """Whether `torch.compile` was called with it, its forward pass or its class's; what keeps a compiler out is not
    that, though it looks alike."""
    forward = module.forward
    compiled = hasattr(forward, "_torchdynamo_orig_callable")
    return compiled and not getattr(forward, "_torchdynamo_disable", False)


def _through_a_door(compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        args, kwargs = _ordinary(args), _ordinary(kwargs)
    return compiled(*args, **kwargs)


def _door(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return None if torch.compiler.is_compiling() else (_ordinary(args), _ordinary(kwargs))


def _ordinary(arguments: Any) -> Any:
    return tree_map_only((Lazy, Watched), _as_ordinary, arguments)


def _as_ordinary(x: Tensor) -> Tensor:
    """The same place in the graph and the same memory, in PyTorch's own class."""
    if type(x) is Lazy:
        return real(x)
    let_go(x)  # what is compiled may change it in place
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
        found: Tensor = torch.ops.aten.alias.default(x)
    return found.as_subclass(Tensor) if type(found) is not Tensor else found
