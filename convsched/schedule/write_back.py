"""``stage OUTPUT at LOOP window``: an output is made in a buffer, and copied out where each iteration ends.

What makes an output piece by piece, such as tiles of a transform, then stores neighbours side by side in the cache; the
copy has loops of its own (``y.w``, ``y.c``), which later steps split and vectorise, so that rows of many pieces are
stored as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from convsched.ir import Affine, Body, Leaf, Load, Program, Reduce, Store, Tensor, nested
from convsched.ir.grammar import extents_of, leaves_of, storage_of
from convsched.ir.walk import map_touching, touching
from convsched.schedule.footprint import (
    Box,
    Request,
    box_of,
    redirected,
    require_axes,
    require_room,
    require_strides,
    within,
)


def written(request: Request) -> Program:
    """The program whose output is stored in a buffer inside the loop, which is copied out after it."""
    output = request.tensor
    if request.at == "root":
        raise request.fail(f"all of {output.name} would be made twice", "name a loop that makes a part of it")
    order = request.order or output.order
    require_axes(request, order)
    require_strides(request, order)
    box = box_of(request)
    guards = {guard for _, body in request.scopes for guard in _require_filled(request, box, body)}
    names = [f"{output.name}.{letter}" for letter in output.letters]
    place = tuple(b + n for b, n in zip(box.base, names, strict=True))
    extents = {**request.around(), **dict(zip(names, box.sizes, strict=True))}
    limits = {position - size for position, size in zip(place, output.shape, strict=True)}
    limits |= {place[axis] + rest for axis, rest in guards}
    where = tuple(sorted((limit for limit in limits if limit.bounds(extents)[1] >= 0), key=str))
    copy = Store(output.name, place, Load(request.target, tuple(Affine.of(name) for name in names)), where)
    walk = dict.fromkeys(entry[0] for entry in order)
    copied = nested({f"{output.name}.{letter}": box.sizes[output.letters.index(letter)] for letter in walk}, copy)
    buffer = Tensor(request.target, output.letters, box.sizes, "local",
                    storage_of(output.letters, box.sizes, order, request.align))
    require_room(request, buffer, prod(box.sizes))

    def made(body: Body) -> Body:
        stored = map_touching(body, output.name, lambda leaf: _unguarded(request, body, leaf))
        return redirected(stored, output.name, request.target, box.relative) + copied

    return within(request, made).with_tensor(buffer)


def _unguarded(request: Request, body: Body, leaf: Leaf) -> Leaf:
    """A statement that stores to the output without the guards that keep it inside, as the buffer has room for all:
    where what it reads is there, and was not made under a guard of the same variables."""
    extents = {**request.around(), **extents_of(body)}
    if not all(_is_there(request.program, load, extents) for load in leaf.loads):
        return leaf
    inner = _inner_guards(leaf, request.tensor)
    read = {load.tensor for load in leaf.loads}
    bounded = frozenset[str]().union(*(guard.variables for made in leaves_of(body) if made.tensor in read
                                       for guard in made.where))
    return replace(leaf, where=tuple(guard for guard in leaf.where if guard in inner or guard.variables & bounded))


def _inner_guards(leaf: Leaf, output: Tensor) -> tuple[Affine, ...]:
    """The guards of a statement beside those that keep its store inside the output."""
    ends = {position - size for position, size in zip(leaf.index, output.shape, strict=True)}
    return tuple(guard for guard in leaf.where if guard not in ends)


def _is_there(program: Program, load: Load, extents: Mapping[str, int]) -> bool:
    """Whether a load is inside its tensor at all points of the loops."""
    bounds = [position.bounds(extents) for position in load.index]
    return all(low >= 0 and high < size for (low, high), size in zip(bounds, program.tensor(load.tensor).shape,
                                                                     strict=True))


def _require_filled(request: Request, box: Box, body: Body) -> list[tuple[int, Affine]]:
    """Raise unless one statement stores all of the box, once, and nothing reads it. Where further guards cut it short,
    as at the end of a group of channels, each as an axis and what is added to its index."""
    name = request.tensor.name
    users = touching(body, {name})
    if len(users) != 1:
        raise request.fail(f"{len(users)} statements use {name} inside {request.at}", "stage before peel")
    around, leaf = users[0]
    if isinstance(leaf, Reduce) or any(load.tensor == name for load in leaf.loads):
        raise request.fail(f"{name} is read inside {request.at}", "choose a loop around all that sums into it")
    extents = {loop.var: loop.extent for loop in around}
    inner = [position - base for position, base in zip(leaf.index, box.base, strict=True)]
    for axis, position in enumerate(inner):
        others = {v for i, other in enumerate(inner) if i != axis for v in other.variables}
        if position.variables & others or not _counts_up(position, extents):
            raise request.fail(f"{name} is not stored densely along {request.tensor.letters[axis]} inside {request.at}",
                               "choose an outer loop")
    found = []
    for guard in _inner_guards(leaf, request.tensor):
        rests = [(axis, guard - position) for axis, position in enumerate(leaf.index)]
        fitting = [(axis, rest) for axis, rest in rests if not rest.variables & extents.keys()]
        if not fitting:
            raise request.fail(f"the place at which {name} is stored is not bounded along one axis",
                               "use factors that divide")
        found.append(fitting[0])
    return found


def _counts_up(position: Affine, extents: Mapping[str, int]) -> bool:
    """Whether an index takes each value from 0 to its greatest once: its variables are digits of a mixed radix.

    >>> _counts_up(Affine.of("f0") * 4 + "f1", {"f0": 3, "f1": 4}), _counts_up(Affine.of("f0") * 4, {"f0": 3})
    (True, False)
    """
    radix = 1
    for variable, coefficient in sorted(position.terms, key=lambda term: term[1]):
        if extents[variable] > 1 and coefficient != radix:
            return False
        radix *= extents[variable]
    return position.constant == 0
