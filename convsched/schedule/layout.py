"""``layout``: a weight packed in the order of use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from convsched.ir import Program, storage_of
from convsched.schedule.checks import fail
from convsched.schedule.footprint import Request, require_axes
from convsched.schedule.stage import stage
from convsched.schedule.step import _Checked


@dataclass(frozen=True)
class Layout(_Checked):
    """A weight packed in the order of use; see ``placement.layout``."""

    tensor: str
    order: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(["layout", self.tensor, *self.order])


def layout(program: Program, tensor: str, order: Sequence[str]) -> Program:
    """Store a weight in the order of use, one axis for each loop in ``order``.

    >>> from convsched.ir.examples import nests, product
    >>> from convsched.schedule.split import split
    >>> blocked = split(product(8, 2), "m", 4, "m0", "m1")
    >>> print(nests(layout(blocked, "w", ("m0", "c", "m1"))))
    pack w (bind):
      for w.m0 < 2: for w.c < 2: for w.m1 < 4:
        w_packed[w.m0, w.c, w.m1] = w[4 w.m0 + w.m1, w.c]
    conv:
      for m0 < 2: for m1 < 4: for c < 2:
        y[4 m0 + m1] += x[c] * w_packed[m0, c, m1]

    The packing is a stage of its own that runs once, when weights are bound.
    """
    if tensor in program.by_name and program.tensor(tensor).role == "local":
        return _stored(program, tensor, order)
    if tensor in program.by_name and program.tensor(tensor).role != "weight":
        raise fail(program, f"layout {tensor} {' '.join(order)}", f"{tensor} is no weight",
                   "use stage for a tensor that changes from call to call")
    return stage(program, tensor, "root", "packed", order)


def _stored(program: Program, name: str, order: Sequence[str]) -> Program:
    """The program with a local tensor stored in another order of its axes."""
    request = Request(program, f"layout {name} {' '.join(order)}", program.tensor(name), "root", tuple(order), {})
    require_axes(request, order)
    tensor = request.tensor
    return program.with_tensor(replace(tensor, storage=storage_of(tensor.letters, tensor.shape, tuple(order))))
