"""What a compiler has recorded of a tensor so far: whether it was changed, or anything else was made of it.

A layer may leave something on a tensor for another one that is given it, as long as it is as it was. Eager training
knows that by PyTorch's count of changes, which a graph that is compiled does not have; but all that is done is in it.

Imported when something is compiled, as it imports PyTorch's compiler, which takes as long as all else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.comptime import ComptimeContext, comptime

_MARK = "lowrank: made here"
_seen = {"found": False}


def mark(x: Tensor) -> None:
    """Remember that the graph has this tensor as it is now."""
    comptime(_mark)


def is_untouched(x: Tensor) -> bool:
    """Whether it is a marked tensor with which nothing was done since, a view, a change in place or a hook included.
    Not within a checkpoint what was made ahead of it: what is done there is in a graph of its own."""
    comptime(_is_untouched)
    return _found()


def is_only_read(x: Tensor) -> bool:
    """Whether the graph has made it, and it was given to nothing but layers and operators that change nothing."""
    comptime(_is_only_read)
    return _found()


@torch.compiler.assume_constant_result
def _found() -> bool:
    return _seen["found"]


def _mark(ctx: ComptimeContext) -> None:
    _node(ctx).meta[_MARK] = True


def _is_untouched(ctx: ComptimeContext) -> None:
    node = _node(ctx)
    _seen["found"] = _MARK in node.meta and node.graph is ctx.graph() and all(map(_is_question, node.users))


def _is_only_read(ctx: ComptimeContext) -> None:
    node = _node(ctx)
    _seen["found"] = node.op != "placeholder" and node.graph is ctx.graph() and _changes_nothing(node)


def _node(ctx: ComptimeContext) -> torch.fx.Node:
    proxy: Any = ctx.get_local("x").as_proxy()
    node: torch.fx.Node = proxy.node
    return node


def _is_question(user: torch.fx.Node) -> bool:
    """Whether it asks for the dtype or the like; not for a view, which somebody uses."""
    return user.target is getattr and not user.users


def _changes_nothing(node: torch.fx.Node) -> bool:
    for user in node.users:
        same = user.op == "call_method" and user.target in _SAME
        if not (_is_question(user) or user.target in _READERS or (same and _changes_nothing(user))):
            return False
    return True


# What may give the same numbers in the same memory, and what gives others.
_SAME = {"detach", "to", "unsqueeze"}
_READERS: set[Callable[..., Any] | str] = {
    *(torch.nn.functional.linear, torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.ops.higher_order.autograd_function_apply, torch.ops.lowrank.compress.default),
}
