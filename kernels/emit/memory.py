"""Loads and stores of a scheduled nest as LLVM IR: strides, masks, reuse.

A vector access whose lanes are one element apart is a vector load or store; lanes that share an element are
one scalar, broadcast; lanes a constant distance apart, in a run of neighbouring elements, are rows moved
whole and transposed in registers; anything else is a gather or scatter. Loads are remembered by address
until a loop begins or ends, or their tensor is written: the reuse that unrolling exposes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convsched.ir import Affine, Index, Tensor
from convsched.kernels.emit.addresses import Addresses, Lanes, Place, Point, base
from convsched.kernels.emit.vectors import Mask, both, mask_text, shuffle, splat, suffix, transpose, vector_type
from convsched.kernels.emit.writer import Writer


class Memory(Addresses):
    """Emits the accesses of one function."""

    def __init__(self, writer: Writer, point: Point, width: int, masks: bool) -> None:
        """``width`` lanes of a register; ``masks``: whether a store of some of them is one instruction, and quick."""
        super().__init__(writer, point)
        self.width = width
        self.masks = masks
        self.loaded: dict[tuple[object, ...], str] = {}
        self.pending: dict[tuple[str, str, int, int], dict[int, tuple[str, Mask | None]]] = {}

    # Loads

    def forget(self, tensor: str | None = None) -> None:
        """Drop remembered loads of a tensor, or all."""
        self.loaded = {k: v for k, v in self.loaded.items() if tensor is not None and k[0] != tensor}

    def load(self, tensor: Tensor, index: Index, lanes: Lanes) -> str:
        """An element a lane; elements outside the tensor are zero."""
        if any(key[0] == tensor.name for key in self.pending):
            self.flush()
        place = self.place(tensor, index, lanes)
        if (run := self._run(tensor, index, place, lanes)) is not None:
            return self._column(tensor, index, place, lanes, run)
        condition, mask = self.within(tensor, index, lanes)
        if lanes.count > 1 and place.stride == 0 and place.scattered is None and not _by_lane(mask):
            return self._broadcast(tensor, place, lanes, index, (condition, mask))
        key = (tensor.name, place.pointer, place.constant, place.stride, lanes.count, condition, mask, place.scattered)
        if key not in self.loaded:
            self.loaded[key] = self._load(tensor, index, place, lanes, condition, mask)
        return self.loaded[key]

    def _broadcast(self, tensor: Tensor, place: Place, lanes: Lanes, index: Index, inside: object) -> str:
        """One element for all lanes; ``inside`` tells accesses of one address apart where one is outside the tensor."""
        key = (tensor.name, place.pointer, place.constant, "broadcast", lanes.count, inside)
        if key not in self.loaded:
            self.loaded[key] = splat(self.w, self.load(tensor, index, Lanes()), lanes.count)
        return self.loaded[key]

    def _load(self, tensor: Tensor, index: Index, place: Place, lanes: Lanes, condition: str | None,
              mask: Mask | None) -> str:
        if isinstance(mask, tuple) and not any(mask):
            return "zeroinitializer" if lanes.count > 1 else "0.0"
        if isinstance(mask, tuple) and all(mask):
            mask = None
        if lanes.count == 1:
            return self._scalar(tensor, place, mask)
        if place.scattered is None:
            if place.stride == 1:
                return self.contiguous(place.pointer, place.constant, lanes.count, mask, condition)
            if 2 <= place.stride <= 4 and not isinstance(mask, str):
                return self._deinterleaved(tensor, index, place, lanes.count, mask, condition)
        if condition is not None:
            mask = both(self.w, splat(self.w, condition, lanes.count, "i1"), mask, lanes.count)
        return self._gather(place, lanes.count, mask)

    def _scalar(self, tensor: Tensor, place: Place, mask: Mask | None) -> str:
        pointer = self.w.displaced(place.pointer, place.constant)
        if mask is None:
            return self.w.let(f"load float, ptr {pointer}, align 4")
        safe = self.w.let(f"select i1 {mask_text(mask, 1)}, ptr {pointer}, ptr {base(tensor.name)}")
        value = self.w.let(f"load float, ptr {safe}, align 4")
        return self.w.let(f"select i1 {mask_text(mask, 1)}, float {value}, float 0.0")

    def contiguous(self, pointer: str, constant: int, lanes: int, mask: Mask | None,
                   condition: str | None = None) -> str:
        """Neighbouring elements; those outside the mask are not touched and give zero, as all do where the condition
        does not hold."""
        kind = vector_type(lanes)
        at = self.w.displaced(pointer, constant)
        if condition is not None:
            at = self.w.let(f"select i1 {condition}, ptr {at}, ptr {self.w.zeros()}")
        if mask is None:
            return self.w.let(f"load {kind}, ptr {at}, align 4")
        name, bits = f"@llvm.masked.load.{suffix(lanes)}.p0", vector_type(lanes, "i1")
        self.w.declare(f"{kind} {name}(ptr, i32, {bits}, {kind})")
        return self.w.let(f"call {kind} {name}(ptr {at}, i32 4, {bits} {mask_text(mask, lanes)}, "
                          f"{kind} zeroinitializer)")

    def _deinterleaved(self, tensor: Tensor, index: Index, place: Place, lanes: int, mask: Mask | None,
                       condition: str | None) -> str:
        """Every ``stride``-th element of a run of vectors, which accesses a few elements apart share.

        The run starts at a multiple of the stride; where it may leave the tensor's memory, the pieces are
        masked to the elements that are wanted.
        """
        stride = place.stride
        skip = place.constant % stride
        first = place.constant - skip
        low, high = self.point.bounds(self.offset(tensor, index).affine)
        inside = low >= stride and high + stride <= tensor.elements
        wanted = mask if isinstance(mask, tuple) else (True,) * lanes
        sources = [skip + lane * stride for lane in range(lanes)]
        pieces: dict[int, str] = {}
        read = [source for source, want in zip(sources, wanted, strict=True) if want]
        for part in sorted({source // lanes for source in read}):
            touched = [source % lanes for source in read if source // lanes == part]
            reach = None if inside else tuple(touched[0] <= i <= touched[-1] for i in range(lanes))
            pieces[part] = self._piece(tensor, place.pointer, first + part * lanes, lanes, reach, condition)
        value = self._pick(pieces, sources, lanes)
        if mask is None:
            return value
        return self.w.let(f"select {vector_type(lanes, 'i1')} {mask_text(mask, lanes)}, {vector_type(lanes)} "
                          f"{value}, {vector_type(lanes)} zeroinitializer")

    def _pick(self, pieces: Mapping[int, str], sources: Sequence[int], lanes: int) -> str:
        """Lane i is element ``sources[i]`` of the pieces laid end to end; two pieces take one shuffle."""
        (first, value), *others = pieces.items()
        gathered = [s % lanes if s // lanes == first else lane for lane, s in enumerate(sources)]
        if not others:
            return shuffle(self.w, value, "poison", lanes, gathered)
        for number, (part, piece) in enumerate(others):
            own = gathered if number == 0 else range(lanes)
            value = shuffle(self.w, value, piece, lanes, [
                lanes + s % lanes if s // lanes == part else own[lane] for lane, s in enumerate(sources)])
        return value

    def _piece(self, tensor: Tensor, pointer: str, constant: int, lanes: int, reach: Mask | None,
               condition: str | None) -> str:
        key = (tensor.name, pointer, constant, "piece", lanes, reach, condition)
        if key not in self.loaded:
            self.loaded[key] = self.contiguous(pointer, constant, lanes, reach, condition)
        return self.loaded[key]

    def _run(self, tensor: Tensor, index: Index, place: Place, lanes: Lanes) -> str | None:
        """The unrolled loop whose iterations read neighbours in memory, where lanes are rows a constant distance apart
        that lie inside the tensor alike; None where there is no such loop."""
        if lanes.count not in (4, 8, 16) or lanes.count != self.width or place.scattered or 0 <= place.stride <= 4:
            return None
        runs = [var for var, c in self.offset(tensor, index).affine.terms
                if c == 1 and self.point.unrolled.get(var, 1) > 1]
        alike = all(lanes.var not in end.variables for end in self.open_ends(tensor, index))
        return runs[0] if len(runs) == 1 and alike else None

    def _column(self, tensor: Tensor, index: Index, place: Place, lanes: Lanes, run: str) -> str:
        """A column of rows that are loaded whole and transposed; other iterations of the run find theirs remembered."""
        ends = self.open_ends(tensor, index)
        across = [end for end in ends if run in end.variables]
        condition = self.condition([end for end in ends if run not in end.variables])
        here = self.point.known[run]
        chunk = here // lanes.count * lanes.count
        length = min(lanes.count, self.point.unrolled[run] - chunk)
        first = place.constant - here + chunk
        splits = [(end.coefficient(run), *self.point.split(end, Lanes())[:2]) for end in across]
        limits = tuple((constant - step * here, *terms) for step, constant, terms in splits)

        def key(at: int) -> tuple[object, ...]:
            return (tensor.name, place.pointer, first + at, place.stride, lanes.count, condition, limits, "column")

        if any(self.point.bounds(end)[0] >= 0 for end in across):
            return "zeroinitializer"
        if key(here - chunk) not in self.loaded:
            reach: Mask | None = None if length == lanes.count else tuple(i < length for i in range(lanes.count))
            reach = both(self.w, reach, self._within_row(tensor, index, run, chunk, lanes.count), lanes.count)
            if isinstance(reach, tuple) and all(reach):
                reach = None
            rows = [self.contiguous(place.pointer, first + lane * place.stride, lanes.count, reach, condition)
                    for lane in range(lanes.count)]
            for i, column in enumerate(transpose(self.w, rows, lanes.count)[:length]):
                self.loaded[key(i)] = column
        return self.loaded[key(here - chunk)]

    def _within_row(self, tensor: Tensor, index: Index, run: str, first: int, count: int) -> Mask | None:
        """Which iterations of an unrolled loop, from the first on, lie inside the tensor along the axes it moves on."""
        here, mask = self.point.known.pop(run), None
        for size, a in zip(tensor.shape, index, strict=True):
            if run in a.variables:
                along = a.substitute({run: Affine.of(run) + first})
                for end, unmoved in ((along * -1 - 1, a * -1 - 1), (along - size, a - size)):
                    if unmoved not in self.granted:
                        mask = both(self.w, mask, self.negative(end, Lanes(run, count)), count)
        self.point.known[run] = here
        return mask

    def _addresses(self, place: Place, lanes: int) -> str:
        steps = ", ".join(f"i64 {place.constant + place.stride * lane}" for lane in range(lanes))
        offsets, kind = f"<{steps}>", vector_type(lanes, "i64")
        if place.scattered is not None:
            offsets = self.w.let(f"add {kind} {place.scattered}, {offsets}")
        return self.w.let(f"getelementptr float, ptr {place.pointer}, {kind} {offsets}")

    def _gather(self, place: Place, lanes: int, mask: Mask | None) -> str:
        kind, bits, pointers = vector_type(lanes), vector_type(lanes, "i1"), vector_type(lanes, "ptr")
        name = f"@llvm.masked.gather.{suffix(lanes)}.v{lanes}p0"
        self.w.declare(f"{kind} {name}({pointers}, i32, {bits}, {kind})")
        return self.w.let(
            f"call {kind} {name}({pointers} {self._addresses(place, lanes)}, i32 4, "
            f"{bits} {mask_text(mask or (True,) * lanes, lanes)}, {kind} zeroinitializer)")

    # Stores

    def store(self, tensor: Tensor, index: Index, value: str, lanes: Lanes, mask: Mask | None) -> None:
        """Store an element a lane, in the lanes of the mask (never a run-time mask of one lane)."""
        place = self.place(tensor, index, lanes)
        self.forget(tensor.name)
        if isinstance(mask, tuple) and not any(mask):
            return
        if isinstance(mask, tuple) and all(mask):
            mask = None
        if lanes.count == 1:
            pointer = self.w.displaced(place.pointer, place.constant)
            self.w.line(f"  store float {value}, ptr {pointer}, align 4")
        elif place.scattered is None and place.stride == 1:
            self._store_contiguous(place.pointer, place.constant, value, lanes.count, mask)
        elif place.scattered is None and place.stride > 1 and self._may_wait(lanes, mask):
            key = (tensor.name, place.pointer, place.stride, lanes.count)
            self.pending.setdefault(key, {})[place.constant] = (value, mask)
        else:
            self._scatter(place, value, lanes.count, mask)

    def _may_wait(self, lanes: Lanes, mask: Mask | None) -> bool:
        return lanes.count in (4, 8, 16) and lanes.count == self.width and not isinstance(mask, str)

    def _store_contiguous(self, pointer: str, constant: int, value: str, lanes: int, mask: Mask | None) -> None:
        kind = vector_type(lanes)
        at = self.w.displaced(pointer, constant)
        if mask is None:
            self.w.line(f"  store {kind} {value}, ptr {at}, align 4")
            return
        if isinstance(mask, tuple) and not self.masks:
            for first, count in _pieces(mask):
                piece = shuffle(self.w, value, "poison", lanes, range(first, first + count))
                self.w.line(f"  store {vector_type(count)} {self._element(piece, count)}, "
                            f"ptr {self.w.displaced(at, first)}, align 4")
            return
        name, bits = f"@llvm.masked.store.{suffix(lanes)}.p0", vector_type(lanes, "i1")
        self.w.declare(f"void {name}({kind}, ptr, i32, {bits})")
        self.w.line(f"  call void {name}({kind} {value}, ptr {at}, i32 4, {bits} {mask_text(mask, lanes)})")

    def _element(self, piece: str, count: int) -> str:
        """A piece as what is stored: one lane as a scalar."""
        return piece if count > 1 else self.w.let(f"extractelement <1 x float> {piece}, i64 0")

    def _scatter(self, place: Place, value: str, lanes: int, mask: Mask | None) -> None:
        kind, bits, pointers = vector_type(lanes), vector_type(lanes, "i1"), vector_type(lanes, "ptr")
        name = f"@llvm.masked.scatter.{suffix(lanes)}.v{lanes}p0"
        self.w.declare(f"void {name}({kind}, {pointers}, i32, {bits})")
        self.w.line(f"  call void {name}({kind} {value}, {pointers} {self._addresses(place, lanes)}, i32 4, "
                    f"{bits} {mask_text(mask or (True,) * lanes, lanes)})")

    def flush(self) -> None:
        """Store what waits: runs of neighbouring elements as transposed rows."""
        waiting, self.pending = self.pending, {}
        for (_, pointer, stride, lanes), columns in waiting.items():
            for first, run in _runs(columns, lanes):
                mask = run[0][1]
                if len(run) == 1:
                    self._scatter(Place(pointer, first, stride), run[0][0], lanes, mask)
                    continue
                reach = None if len(run) == lanes else tuple(i < len(run) for i in range(lanes))
                for lane, row in enumerate(transpose(self.w, [value for value, _ in run], lanes)):
                    if mask is None or mask[lane]:
                        self._store_contiguous(pointer, first + lane * stride, row, lanes, reach)


def _by_lane(mask: Mask | None) -> bool:
    """Whether a mask may differ between lanes (a splat condition is tested again by the scalar load)."""
    return isinstance(mask, tuple) and len(set(mask)) > 1


def _pieces(mask: Sequence[bool]) -> list[tuple[int, int]]:
    """(first, count) of runs of lanes in a mask, cut to powers of two.

    >>> _pieces((True,) * 7 + (False,))
    [(0, 4), (4, 2), (6, 1)]
    """
    found, first = [], 0
    while first < len(mask):
        length = next((i for i, bit in enumerate(mask[first:]) if not bit), len(mask) - first)
        count = 1 << length.bit_length() >> 1
        if count:
            found.append((first, count))
        first += count or 1
    return found


def _runs(columns: Mapping[int, tuple[str, Mask | None]],
          longest: int) -> list[tuple[int, list[tuple[str, Mask | None]]]]:
    """Maximal runs of neighbouring offsets with one mask, cut at ``longest``."""
    runs: list[tuple[int, list[tuple[str, Mask | None]]]] = []
    for constant, column in sorted(columns.items()):
        if runs:
            first, run = runs[-1]
            if constant == first + len(run) and len(run) < longest and run[0][1] == column[1]:
                run.append(column)
                continue
        runs.append((constant, [column]))
    return runs
