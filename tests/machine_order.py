"""Programs as a machine runs them: lanes of a vector loop one statement after another, threads with own memory.

What the interpreter does in order, it then does in the least convenient order that a machine may take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from convsched.ir import Affine, Body, Load, Loop, Program, Stage, leaves, loads, map_leaves, map_value, substitute


def lanes_apart(body: Body) -> Body:
    """Vector loops as lanes that run statement by statement, from the last lane to the first."""
    out: list[Any] = []
    for s in body:
        if isinstance(s, Loop) and s.kind == "vector":
            mirrored = {s.var: Affine.of(s.extent - 1) - s.var}
            out += [Loop(s.var, s.extent, substitute((leaf,), mirrored)) for leaf in s.body]
        else:
            out.append(replace(s, body=lanes_apart(s.body)) if isinstance(s, Loop) else s)
    return tuple(out)


def share(body: Body, thread: int, threads: int) -> Body:
    """One thread's part of a stage."""
    out: list[Any] = []
    for s in body:
        if isinstance(s, Loop) and s.kind == "parallel":
            first, last = s.extent * thread // threads, s.extent * (thread + 1) // threads
            if last > first:
                moved = substitute(s.body, {s.var: Affine.of(s.var) + first})
                out.append(Loop(s.var, last - first, moved))
        elif isinstance(s, Loop):
            if inside := share(s.body, thread, threads):
                out.append(replace(s, body=inside))
        else:
            out.append(s)
    return tuple(out)


def with_suffix(body: Body, names: set[str], suffix: str) -> Body:
    """The body with some tensors renamed."""
    def renamed(name: str) -> str:
        return name + suffix if name in names else name
    return map_leaves(body, lambda leaf: replace(
        leaf, tensor=renamed(leaf.tensor),
        value=map_value(leaf.value, lambda load: Load(renamed(load.tensor), load.index))))


def threaded(program: Program, threads: int) -> Program:
    """Each stage with parallel loops as the shares of threads, the last thread first."""
    users: dict[str, set[str]] = {}
    for stage in program.stages:
        for _, leaf in leaves(stage.body):
            for name in (leaf.tensor, *(load.tensor for load in loads(leaf.value))):
                users.setdefault(name, set()).add(stage.name)
    private = {t.name for t in program.tensors if t.role in ("local", "register") and len(
        users.get(t.name, ())) == 1}
    stages: list[Stage] = []
    tensors = list(program.tensors)
    for stage in program.stages:
        if stage.when == "bind" or not any(
                loop.kind == "parallel" for around, _ in leaves(stage.body) for loop in around):
            stages.append(stage)
            continue
        for thread in reversed(range(threads)):
            body = with_suffix(share(stage.body, thread, threads), private, f".{thread}")
            stages.append(replace(stage, name=f"{stage.name} {thread}", body=body))
    tensors += [replace(program.tensor(n), name=f"{n}.{i}") for n in sorted(private) for i in range(threads)]
    return replace(program, tensors=tuple(tensors), stages=tuple(stages))
