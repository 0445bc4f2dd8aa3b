"""Loads and stores of a scheduled nest as LLVM IR: strides, masks, reuse.

A vector access whose lanes are one element apart is a vector load or store; lanes that share an element are
one scalar, broadcast; lanes a constant distance apart, in a run of neighbouring elements, are rows moved
whole and transposed in registers; anything else is a gather or scatter. Loads are remembered by address
until a loop begins or ends, or their tensor is written: the reuse that unrolling exposes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convsched.ir import Affine, Tensor
from convsched.kernels.emit.addresses import Addresses, Place, base
from convsched.kernels.emit.forms import Form, Lanes, Point, Reference, form
from convsched.kernels.emit.vectors import Mask, both, mask_text, shuffle, splat, suffix, transpose, vector_type
from convsched.kernels.emit.writer import Writer


class Memory(Addresses):
    """Emits the accesses of one function."""

    def __init__(self, writer: Writer, point: Point, masks: bool) -> None:
        """``masks``: whether a store of some lanes is one instruction, and quick."""
        super().__init__(writer, point)
        self.masks = masks
        self.loaded: dict[str, dict[tuple[object, ...], str]] = {}  # by tensor
        self.pending: dict[tuple[str, str, int, int], dict[int, tuple[str, Mask | None]]] = {}

    # Loads

    def forget(self) -> None:
        """Drop what was loaded."""
        self.loaded = {}

    def load(self, at: Reference) -> str:
        """An element a lane; elements outside the tensor are zero."""
        name, lanes = at.tensor.name, at.lanes
        if self.pending and any(key[0] == name for key in self.pending):
            self.flush()
        place = self.place(at)
        held = self.loaded.get(name)
        if held is None:
            held = self.loaded[name] = {}
        if at.kind == "transposed" and self._is_whole(at):
            return self._column(at, place, held)
        condition, mask = self.within(at) if at.axes else (None, None)
        if at.kind == "broadcast" and not _by_lane(mask):
            # what is inside tells accesses of one address apart where one is outside the tensor
            key: tuple[object, ...] = (place.pointer, place.constant, "broadcast", lanes.count, condition, mask)
        else:
            key = (*place, lanes.count, condition, mask)
        found = held.get(key)
        if found is None:
            if key[2] == "broadcast":
                found = splat(self.w, self.load(at.one), lanes.count)
            else:
                found = self._load(at, place, condition, mask)
            held[key] = found
        return found

    def _load(self, at: Reference, place: Place, condition: str | None, mask: Mask | None) -> str:
        count = at.lanes.count
        if isinstance(mask, tuple) and not any(mask):
            return "zeroinitializer" if count > 1 else "0.0"
        if isinstance(mask, tuple) and all(mask):
            mask = None
        if at.kind == "scalar":
            return self._scalar(at.tensor, place, mask)
        if at.kind == "contiguous":
            return self.contiguous(place.pointer, place.constant, count, mask, condition)
        if at.kind == "strided" and not isinstance(mask, str):
            return self._deinterleaved(at, place, mask, condition)
        if condition is not None:
            mask = both(self.w, splat(self.w, condition, count, "i1"), mask, count)
        return self._gather(place, count, mask)

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

    def _deinterleaved(self, at: Reference, place: Place, mask: Mask | None, condition: str | None) -> str:
        """Every ``stride``-th element of a run of vectors, which accesses a few elements apart share.

        The run starts at a multiple of the stride; where it may leave the tensor's memory, the pieces are
        masked to the elements that are wanted.
        """
        stride, lanes, address = place.stride, at.lanes.count, at.address
        skip = place.constant % stride
        first = place.constant - skip
        known = address.at(self.point.known)
        inside = known + address.low >= stride and known + address.high + stride <= at.tensor.elements
        wanted = mask if isinstance(mask, tuple) else (True,) * lanes
        sources = [skip + lane * stride for lane in range(lanes)]
        pieces: dict[int, str] = {}
        read = [source for source, want in zip(sources, wanted, strict=True) if want]
        for part in sorted({source // lanes for source in read}):
            touched = [source % lanes for source in read if source // lanes == part]
            reach = None if inside else tuple(touched[0] <= i <= touched[-1] for i in range(lanes))
            pieces[part] = self._piece(at.tensor, place.pointer, first + part * lanes, lanes, reach, condition)
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
        held = self.loaded[tensor.name]
        key = (pointer, constant, "piece", lanes, reach, condition)
        if key not in held:
            held[key] = self.contiguous(pointer, constant, lanes, reach, condition)
        return held[key]

    def _is_whole(self, at: Reference) -> bool:
        """Whether all rows of a transposed access lie inside the tensor alike."""
        return all(not end.form.stride for end in self.open_ends(at))

    def _column(self, at: Reference, place: Place, held: dict[tuple[object, ...], str]) -> str:
        """A column of rows that are loaded whole and transposed; other iterations of the run find theirs remembered."""
        run, count, known = at.run, at.lanes.count, self.point.known
        ends = [end.one for end in self.open_ends(at)]
        across = [end for end in ends if end.affine.coefficient(run)]
        condition = self.condition([end for end in ends if not end.affine.coefficient(run)])
        here = known[run]
        chunk = here // count * count
        length = min(count, at.site.unrolled[run] - chunk)
        first = place.constant - here + chunk
        limits = tuple([(end.at(known) - end.affine.coefficient(run) * here, *end.terms(self.point))
                        for end in across])

        def key(at: int) -> tuple[object, ...]:
            return (place.pointer, first + at, place.stride, count, condition, limits, "column")

        if any(end.at(known) + end.low >= 0 for end in across):
            return "zeroinitializer"
        if key(here - chunk) not in held:
            reach: Mask | None = None if length == count else tuple(i < length for i in range(count))
            reach = both(self.w, reach, self._within_row(at, chunk), count)
            if isinstance(reach, tuple) and all(reach):
                reach = None
            rows = [self.contiguous(place.pointer, first + lane * place.stride, count, reach, condition)
                    for lane in range(count)]
            for i, column in enumerate(transpose(self.w, rows, count, length)):
                held[key(i)] = column
        return held[key(here - chunk)]

    def _within_row(self, at: Reference, first: int) -> Mask | None:
        """Which iterations of an unrolled loop, from the first on, lie inside the tensor along the axes it moves on."""
        mask: Mask | None = None
        for size, a in zip(at.tensor.shape, at.index, strict=True):
            if at.run in a.variables:
                along = a.substitute({at.run: Affine.of(at.run) + first})
                for end, unmoved in ((along * -1 - 1, a * -1 - 1), (along - size, a - size)):
                    if unmoved not in self.granted:
                        mask = both(self.w, mask, self.negative(self._along(at, end), Lanes(at.run, at.lanes.count)),
                                    at.lanes.count)
        return mask

    def _along(self, at: Reference, a: Affine) -> Form:
        """An affine expression whose lanes are the iterations of a transposed access's run."""
        return form(a, at.site.known - {at.run}, at.run, at.site.extents)

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

    def store(self, at: Reference, value: str, mask: Mask | None) -> None:
        """Store an element a lane, in the lanes of the mask (never a run-time mask of one lane)."""
        place, count = self.place(at), at.lanes.count
        self.loaded.pop(at.tensor.name, None)
        if isinstance(mask, tuple) and not any(mask):
            return
        if isinstance(mask, tuple) and all(mask):
            mask = None
        if at.kind == "scalar":
            pointer = self.w.displaced(place.pointer, place.constant)
            self.w.line(f"  store float {value}, ptr {pointer}, align 4")
        elif at.kind == "contiguous":
            self._store_contiguous(place.pointer, place.constant, value, count, mask)
        elif at.kind == "transposed" and not isinstance(mask, str):
            key = (at.tensor.name, place.pointer, place.stride, count)
            self.pending.setdefault(key, {})[place.constant] = (value, mask)
        else:
            self._scatter(place, value, count, mask)

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
                for lane, row in enumerate(transpose(self.w, [value for value, _ in run], lanes, lanes)):
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
