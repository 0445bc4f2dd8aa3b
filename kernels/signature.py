"""A kernel's signature: the tensors and functions of its machine code, and their interface as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from convsched.ir import Leaf, Program, Reduce, Role, Tensor, leaves, loads
from convsched.kernels.run import binding


def arguments(program: Program) -> tuple[Tensor, ...]:
    """The tensors whose addresses a kernel takes, in order: all that run stages touch in memory."""
    touched = {name for stage in program.stages if stage.when == "run"
               for _, leaf in leaves(stage.body) for name in names(leaf)}
    return tuple(t for t in program.tensors
                 if t.role not in ("register", "constant") and t.name in touched)


def symbols(program: Program) -> tuple[str, ...]:
    """The function of each run stage, in the order they run."""
    return tuple(f"stage_{i}" for i, s in enumerate(program.stages) if s.when == "run")


def names(leaf: Leaf) -> tuple[str, ...]:
    """The tensors a statement touches."""
    return (leaf.tensor, *(load.tensor for load in loads(leaf.value)))


def _shapes(program: Program, role: Role) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of the tensors of a role: one axis for each that is stored."""
    return {t.name: tuple(part.size for part in t.storage) for t in program.tensors if t.role == role}


def _cleared(program: Program) -> frozenset[str]:
    """The outputs that are read or added to, or stored with tails."""
    run = [leaf for stage in program.stages if stage.when == "run" for _, leaf in leaves(stage.body)]
    used = {name for leaf in run for name in ([leaf.tensor] if isinstance(leaf, Reduce) else [])
            + [load.tensor for load in loads(leaf.value)]}
    return frozenset(t.name for t in program.tensors if t.role == "output"
                     and (t.name in used or prod(part.size for part in t.storage) != prod(t.shape)))


@dataclass(frozen=True)
class Interface:
    """What a caller must know of compiled code: its tensors, its stages and how weights are packed.

    ``inputs``, ``weights`` and ``outputs`` are the tensors of these roles, with the shapes of their arrays: one axis
    for each that is stored. ``cleared`` are the outputs that start as zeros: the code reads them, adds to them, or
    leaves out tails of their storage. ``names`` are all tensors that the code takes the addresses of, in order.
    ``local_elements`` are the sizes of local tensors; those in ``shared`` carry values from stage to stage and are one
    for all threads, the others are private to a thread.
    """

    inputs: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]
    cleared: frozenset[str]
    names: tuple[str, ...]
    local_elements: Mapping[str, int]
    stages: tuple[str, ...]
    is_parallel: tuple[bool, ...]
    shared: frozenset[str]
    bindings: tuple[binding.Binding, ...]

    @staticmethod
    def of(program: Program) -> Interface:
        """The interface of a scheduled program."""
        tensors = arguments(program)
        bound = binding.bindings(program)
        packed = binding.targets(bound)
        run = [s for s in program.stages if s.when == "run"]
        parallel = [any(lp.kind == "parallel" for around, _ in leaves(s.body) for lp in around) for s in run]
        touched = [{n for _, leaf in leaves(s.body) for n in names(leaf)} for s in run]
        local = {t.name: t.elements for t in tensors if t.role == "local" and t.name not in packed}
        crossing = {n for n in local if sum(n in used for used in touched) > 1}
        inputs, weights, outputs = (_shapes(program, role) for role in ("input", "weight", "output"))
        return Interface(inputs, weights, outputs, _cleared(program), tuple(t.name for t in tensors), local,
                         symbols(program), tuple(parallel), frozenset(crossing), bound)

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``from_json`` is its inverse."""
        return {"inputs": self.inputs, "weights": self.weights, "outputs": self.outputs,
                "cleared": sorted(self.cleared), "names": self.names, "local": self.local_elements,
                "stages": self.stages, "parallel": self.is_parallel, "shared": sorted(self.shared),
                "bindings": [bound.to_json() for bound in self.bindings]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Interface:
        """The interface of a JSON value."""
        inputs, weights, outputs = ({name: tuple(shape) for name, shape in value[kind].items()}
                                    for kind in ("inputs", "weights", "outputs"))
        return Interface(inputs, weights, outputs, frozenset(value["cleared"]), tuple(value["names"]),
                         dict(value["local"]), tuple(value["stages"]), tuple(value["parallel"]),
                         frozenset(value["shared"]), tuple(binding.from_json(b) for b in value["bindings"]))
