"""What layers note of a tensor for those that it reaches, in a graph that is compiled: there what
`lowrank.tensors.notes` is in eager training.

A note is the compiler's alone: nothing of it is in the graph, on a tensor, or there when the graph is done. What was
done with a tensor since is in the graph that is recorded so far, and how often it was changed in place in the tensor
that the compiler has in its place.

Imported when something is compiled, as it imports PyTorch's compiler, which takes as long as all else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._ops import HigherOrderOperator

Known = dict[torch.fx.Node, tuple[Any, Any, list[Any]]]  # by a node a fact, what it depends on, and how that was then
Pair = tuple[torch.fx.Node, torch.fx.Node, torch.fx.Node]  # a tensor, what is made without it, what of it
_OFFERS, _FORMS, _PAIRS = "_lowrank_offers", "_lowrank_forms", "_lowrank_pairs"  # of a graph that is recorded
# Of what these give, a change in place does not count in what is changed.
_UNCOUNTED = ("_get_data_attr", "_tensor_version")


def offer(x: Tensor, fact: object, given: tuple[Tensor | None, ...]) -> None:
    """Note a fact of a tensor that nobody has read, which holds for the first who does, and as long as `given` are as
    they are now."""
    comptime(_offer)


def offered(x: Tensor, given: tuple[Tensor | None, ...]) -> Any:
    """What was offered with a tensor with which nothing was done since, a view, a change in place and a hook included,
    but for what is settled at the end; None if that is not so, or the graph has changed one of `given`: a compiler may
    compute again from these in the backward pass, and finds them changed."""
    fact = None
    comptime(_offered)
    return fact


def settle_at_the_end(x: Tensor, without: Tensor, stock: Tensor) -> None:
    """Have two that give the same in a graph until this is whole: `without` what `x` is, and the stock one of `x`.

    Only then it is known what was done with `x` further on. If something may go by its gradient, such as a hook, a part
    that is recorded by itself, or somebody outside who is handed it, the stock one stays; otherwise the one without.
    """
    comptime(_settle_at_the_end)


def note(x: Tensor, fact: object) -> None:
    """Note a fact of a tensor, which holds as long as the tensor is as it is now."""
    comptime(_note)


def noted(x: Tensor) -> Any:
    """What was noted of a tensor, if it is still as it was; None otherwise."""
    fact = None
    comptime(_noted)
    return fact


def _offer(ctx: ComptimeContext) -> None:
    own = _locals(ctx)
    _keep(ctx, _OFFERS, own["given"].items)


def _offered(ctx: ComptimeContext) -> None:
    node = _node(_locals(ctx)["x"])
    settled = {stock for _, _, stock in _pairs(ctx)}
    unread = all(user in settled or _is_question(user) for user in node.users)
    if unread and not any(map(_changes, _locals(ctx)["given"].items)):
        _give(ctx, _OFFERS)


def _settle_at_the_end(ctx: ComptimeContext) -> None:
    own, pairs = _locals(ctx), _pairs(ctx)
    if not pairs:
        _output(ctx).add_graph_finalizer(lambda whole: _settle(whole, pairs))
    pairs.append((_node(own["x"]), _node(own["without"]), _node(own["stock"])))


def _settle(whole: torch.fx.GraphModule, pairs: list[Pair]) -> None:
    """Leave one of each pair in the graph; the compiler drops what nobody reads."""
    for x, without, stock in pairs:
        if all(user is stock or _reads(user) for user in x.users):
            stock.replace_all_uses_with(without)
            stock.graph.erase_node(stock)
        else:
            without.replace_all_uses_with(stock)
    changed = {pair[0].graph for pair in pairs}
    for part in whole.modules():
        if isinstance(part, torch.fx.GraphModule) and part.graph in changed:
            part.recompile()


def _reads(user: torch.fx.Node) -> bool:
    """Whether it asks something of a tensor, or makes another of it, which autograd knows to follow from it."""
    makes = isinstance(user.meta.get("example_value"), Tensor) and not isinstance(user.target, HigherOrderOperator)
    return makes or _is_question(user)


def _note(ctx: ComptimeContext) -> None:
    _keep(ctx, _FORMS, [_locals(ctx)["x"]])


def _noted(ctx: ComptimeContext) -> None:
    _give(ctx, _FORMS)


def _keep(ctx: ComptimeContext, kind: str, given: list[Any]) -> None:
    own = _locals(ctx)
    _known(ctx, kind)[_node(own["x"])] = own["fact"], given, [_state(one) for one in given]


def _give(ctx: ComptimeContext, kind: str) -> None:
    """Not where the tensor comes from another graph, as in a checkpoint, which records what is done there."""
    own = _locals(ctx)
    node = _node(own["x"])
    found = _known(ctx, kind).get(node)
    if found is None or node.graph is not ctx.graph() or [_state(one) for one in found[1]] != found[2]:
        return
    if not _has_uncounted(node):
        own["fact"] = found[0]


def _locals(ctx: ComptimeContext) -> dict[str, Any]:
    """The function's own variables, as the compiler has them."""
    return ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().symbolic_locals


def _output(ctx: ComptimeContext) -> Any:
    return ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().output


def _known(ctx: ComptimeContext, kind: str) -> Known:
    known: Known = vars(_output(ctx)).setdefault(kind, {})
    return known


def _pairs(ctx: ComptimeContext) -> list[Pair]:
    pairs: list[Pair] = vars(_output(ctx)).setdefault(_PAIRS, [])
    return pairs


def _node(variable: Any) -> torch.fx.Node:
    node: torch.fx.Node = variable.as_proxy().node
    return node


def _state(variable: Any) -> tuple[int, bool] | None:
    """How often a tensor was changed in place, and whether it wants a gradient; None: it is none."""
    if variable.is_python_constant():
        return None
    like = _node(variable).meta["example_value"]
    return like._version, like.requires_grad


def _changes(variable: Any) -> int:
    state = _state(variable)
    return 0 if state is None else state[0]


def _is_question(user: torch.fx.Node) -> bool:
    """Whether it asks for the dtype or the like; not for a view, which somebody uses."""
    return user.target is getattr and not user.users


def _has_uncounted(node: torch.fx.Node) -> bool:
    while node.op != "root":
        if any(name in str(node.target) for name in _UNCOUNTED):
            return True
        node = node.next
    return False
