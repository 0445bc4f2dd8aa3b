"""``layout``: store a weight in the order of use, or a local tensor in another order of its axes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convsched.ir import Program, storage_of
from convsched.schedule.checks import fail
from convsched.schedule.footprint import Request, require_axes
from convsched.schedule.stage import copied
from convsched.schedule.step import Step


@dataclass(frozen=True)
class Layout(Step):
    """Store a weight in the order of use, one axis for each loop in ``order``.

    >>> from convsched.ir.examples import nests, product
    >>> from convsched.schedule.split import Split
    >>> blocked = Split("m", 4, "m0", "m1").apply(product(8, 2))
    >>> print(nests(Layout("w", ("m0", "c", "m1")).apply(blocked)))
    pack w (bind):
      for w.m0 < 2: for w.c < 2: for w.m1 < 4:
        w_packed[w.m0, w.c, w.m1] = w[4 w.m0 + w.m1, w.c]
    conv:
      for m0 < 2: for m1 < 4: for c < 2:
        y[4 m0 + m1] += x[c] * w_packed[m0, c, m1]

    The packing is a stage of its own that runs once, when weights are bound. A local tensor is stored in the ``order``
    of its axes, without a copy.
    """

    GRAMMAR = "layout TENSOR ENTRY ..."
    tensor: str
    order: tuple[str, ...]

    def apply(self, program: Program) -> Program:
        found = program.by_name.get(self.tensor)
        if found is None:
            names = ", ".join(program.by_name)
            raise fail(program, self, f"there is no tensor {self.tensor}", f"use one of {names}")
        request = Request(program, self, found, "root", self.order, {})
        if found.role == "weight":
            return copied(request, packed=True)
        if found.role != "local":
            raise fail(program, self, f"{self.tensor} is not a weight",
                       "use stage for a tensor that changes from call to call")
        require_axes(request, self.order)
        return program.with_tensor(replace(found, storage=storage_of(found.letters, found.shape, self.order)))
