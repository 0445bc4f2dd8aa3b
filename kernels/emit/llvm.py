"""A scheduled nest as LLVM IR. The emitter decides nothing: it transliterates loops, loads and stores.

One function a run stage: ``void stage_i(ptr tensors, i64 thread, i64 threads)`` where ``tensors`` points to
the addresses of the program's tensors in the order of ``arguments(program)``. A parallel loop runs the
iterations ``extent * thread / threads`` up to ``extent * (thread + 1) / threads``. A guard that all
statements of a run-time loop share becomes a bound of the loop where it can. Elements of register
tensors are SSA values, carried around run-time loops by phis; that needs every index of theirs to be known,
so a register tensor indexed by a run-time loop or a digit lives on the stack instead. An element of a constant is a
literal where its index is known, and comes from a table of the module where it is not.
"""

from __future__ import annotations

import itertools

from convsched.ir import (
    Affine,
    Block,
    Body,
    Const,
    Leaf,
    Let,
    Load,
    Loop,
    Op,
    Program,
    Reduce,
    Stage,
    Store,
    Tensor,
    Value,
    leaves,
    loads,
    matrix_of,
)
from convsched.ir.ahead import fetches
from convsched.kernels.emit.addresses import Lanes, Point, base
from convsched.kernels.emit.constants import Constants
from convsched.kernels.emit.memory import Memory
from convsched.kernels.emit.vectors import Mask, constant, mask_text, multiply_add, operation, splat, vector_type
from convsched.kernels.emit.writer import Writer
from convsched.kernels.signature import arguments, names, symbols
from convsched.machine import Machine

# Between unrolled iterations that add to the same registers: loads stay in their iteration. The scheduler of
# LLVM otherwise starts the next one's early, and a tile that fills the registers spills.
BARRIER = '  call void asm sideeffect "", "~{memory}"()'

Register = tuple[str, tuple[int, ...], int]  # tensor, index with lane 0, lanes


def emit(program: Program, machine: Machine) -> str:
    """The LLVM module of a program's run stages; the same program gives the same text."""
    functions, declarations, tables = [], set[str](), dict[str, str]()
    for symbol, stage in zip(symbols(program), (s for s in program.stages if s.when == "run"), strict=True):
        emitter = _Emitter(program, stage, machine)
        functions.append(emitter.function(symbol))
        declarations |= emitter.w.declarations
        tables |= emitter.constants.tables | emitter.w.globals
    bits = machine.vector_bytes * 8
    attributes = (f'attributes #0 = {{ nounwind "prefer-vector-width"="{bits}" '
                  f'"min-legal-vector-width"="{bits}" }}')
    return "\n".join([*tables.values(), *functions, *sorted(declarations), attributes, ""])


class _Emitter:
    """Walks one stage."""

    def __init__(self, program: Program, stage: Stage, machine: Machine) -> None:
        self.program = program
        self.stage = stage
        self.fused = machine.isa != "sse"
        self.w = Writer(machine.isa)
        self.point = Point()
        self.memory = Memory(self.w, self.point, machine.lanes, machine.isa == "avx512")
        self.registers: dict[Register, str] = {}
        self.set_under: dict[Register, tuple[Affine, ...]] = {}  # the guards of what last set a register
        self.on_stack = _on_stack(program, stage)
        self.granted = self.memory.granted  # guards that the bounds of loops ensure
        self.ahead: dict[str, int] = {}  # elements from what is read of a tensor to what is fetched
        self.fetched: set[tuple[str, int]] = set()
        self.constants = Constants(program, self.point)
        self.summing: dict[int, bool] = {}  # by the identity of an unrolled loop: whether it sums products

    def function(self, symbol: str) -> str:
        """The text of the stage's function."""
        used = {name for _, leaf in leaves(self.stage.body) for name in names(leaf)}
        prologue = []
        for position, tensor in enumerate(arguments(self.program)):
            if tensor.name in used:
                prologue += [f"  %{tensor.name}.slot = getelementptr ptr, ptr %tensors, i64 {position}",
                             f"  %{tensor.name} = load ptr, ptr %{tensor.name}.slot, align 8"]
        prologue += [f"  %{name} = alloca [{self.program.tensor(name).elements} x float], align 64"
                     for name in sorted(self.on_stack)]
        self.body(self.stage.body)
        self.memory.flush()
        prologue += [f"  {base(name)} = getelementptr float, ptr @{base(name)[1:]}, i64 0"
                     for name in self.constants.tables]
        scope = self.w.scopes[0]
        head = f"define void @{symbol}(ptr %tensors, i64 %thread, i64 %threads) #0 {{"
        return "\n".join([head, "entry:", *prologue, *scope.hoisted, *scope.lines, "  ret void", "}"])

    # Loops

    def body(self, body: Body) -> None:
        for statement in body:
            if isinstance(statement, Loop):
                self.loop(statement)
            elif isinstance(statement, Let):
                self.let(statement)
            else:
                self.leaf(statement, Lanes())

    def loop(self, loop: Loop) -> None:
        self.memory.enter(loop)
        if loop.kind == "vector" and loop.extent > 1:
            for leaf in loop.body:
                assert not isinstance(leaf, Block)
                self.leaf(leaf, Lanes(loop.var, loop.extent))
        elif loop.kind == "unroll" or (loop.extent == 1 and loop.kind != "parallel"):
            self.point.unrolled[loop.var] = loop.extent
            barrier = self.sums_over(loop)
            for value in self.constants.useful(loop):
                if value and barrier:
                    self.w.line(BARRIER)
                self.point.known[loop.var] = value
                self.body(loop.body)
            self.point.known.pop(loop.var, None)  # not there where no iteration does anything
            del self.point.unrolled[loop.var]
        else:
            self.run_time_loop(loop)

    def let(self, named: Let) -> None:
        """Statements for which a variable has a value: known, or computed where the loops it depends on begin."""
        self.memory.enter(named)
        value = self.memory.digit(named)
        values: dict[str, int] | dict[str, str] = self.point.known if isinstance(value, int) else self.point.dynamic
        values[named.var] = value  # type: ignore[assignment]
        self.body(named.body)
        del values[named.var]

    def sums_over(self, loop: Loop) -> bool:
        """Whether iterations add products of data to the same registers."""
        if id(loop) not in self.summing:
            self.summing[id(loop)] = self._sums_over(loop)
        return self.summing[id(loop)]

    def _sums_over(self, loop: Loop) -> bool:
        return any(isinstance(leaf, Reduce) and self.in_registers(leaf.tensor) and matrix_of(self.program, leaf) is None
                   and all(loop.var not in a.variables for a in leaf.index) for _, leaf in leaves(loop.body))

    def run_time_loop(self, loop: Loop) -> None:
        """A loop with its test at the bottom; register tensors written inside are phis at its head."""
        self.memory.flush()
        self.memory.forget()
        w = self.w
        number = w.fresh("")[1:]
        var, head, done = f"%{loop.var}.{number}", f"head{number}", f"done{number}"
        first, last = "0", str(loop.extent)
        if loop.kind == "parallel":
            first, last = self.share(loop.extent)
        guards = self.guards(loop)
        first, last = self.bounded(loop, first, last, guards)
        if loop.kind == "parallel" or guards:
            some = w.let(f"icmp slt i64 {first}, {last}")
            w.line(f"  br i1 {some}, label %{head}, label %{done}")
        else:
            w.line(f"  br label %{head}")
        before = w.label
        self.granted += guards
        carried = {r: self.registers.get(r, "zeroinitializer" if r[2] > 1 else "0.0")
                   for r in self.written(loop.body)}
        phis = {r: w.fresh("a") for r in carried}
        outside = dict(self.registers)
        self.registers.update(phis)
        self.point.dynamic[loop.var] = var
        w.open_scope(loop.var)
        w.label = head
        around, self.ahead = self.ahead, {**self.ahead, **fetches(self.program, loop)}
        self.body(loop.body)
        self.ahead = around
        self.memory.flush()
        self.memory.forget()
        following = w.let(f"add nuw nsw i64 {var}, 1")
        more = w.let(f"icmp slt i64 {following}, {last}")
        w.line(f"  br i1 {more}, label %{head}, label %{done}")
        scope = w.scopes.pop()
        lines = [f"{head}:", f"  {var} = phi i64 [ {first}, %{before} ], [ {following}, %{w.label} ]"]
        for register, phi in phis.items():
            kind = vector_type(register[2])
            lines.append(f"  {phi} = phi {kind} [ {carried[register]}, %{before} ], "
                         f"[ {self.registers[register]}, %{w.label} ]")
        w.scopes[-1].lines += [*lines, *scope.hoisted, *scope.lines]
        latch = w.label
        w.start_block(done)
        if loop.kind == "parallel":  # a thread may have no iteration: nothing from inside is known after it
            self.registers = outside
        elif guards:  # nor may there be one for this point
            for register in phis:
                after, kind = w.fresh("a"), vector_type(register[2])
                w.line(f"  {after} = phi {kind} [ {carried[register]}, %{before} ], "
                       f"[ {self.registers[register]}, %{latch} ]")
                self.registers[register] = after
        del self.point.dynamic[loop.var], self.granted[len(self.granted) - len(guards):]

    def guards(self, loop: Loop) -> list[Affine]:
        """The guards that all statements of a run-time loop share and that bound its variable: those that
        may fail, and depend on nothing inside."""
        shared: list[Affine] | None = None
        for _, leaf in leaves(loop.body):
            shared = [w for w in (leaf.where if shared is None else shared) if w in leaf.where]
        around = {*self.point.known, *self.point.dynamic, loop.var}
        return [w for w in shared or () if loop.var in w.variables and w.variables <= around
                and self.point.bounds(w)[1] >= 0]

    def bounded(self, loop: Loop, first: str, last: str, guards: list[Affine]) -> tuple[str, str]:
        """The iterations for which the guards hold: ``k v + rest < 0`` is ``v < ceil(-rest / k)``, and for a
        negative k, ``v > floor(rest / -k)``."""
        w = self.w
        for guard in guards:
            k = guard.coefficient(loop.var)
            rest = self.memory.value(guard - Affine.of(loop.var) * k, Lanes())
            if k > 0:  # v < ceil(-rest / k) = floor((k - 1 - rest) / k)
                limit = self.floor(w.let(f"sub i64 {k - 1}, {rest}"), k)
                last = w.let(f"call i64 @llvm.smin.i64(i64 {last}, i64 {limit})")
            else:
                limit = w.let(f"add i64 1, {self.floor(rest, -k)}")
                first = w.let(f"call i64 @llvm.smax.i64(i64 {first}, i64 {limit})")
        if guards:
            w.declarations |= {f"declare i64 @llvm.{name}.i64(i64, i64)" for name in ("smin", "smax")}
        return first, last

    def floor(self, value: str, by: int) -> str:
        """The quotient, rounded down."""
        if by == 1:
            return value
        w = self.w
        quotient, rest = w.let(f"sdiv i64 {value}, {by}"), w.let(f"srem i64 {value}, {by}")
        below = w.let(f"icmp slt i64 {rest}, 0")
        return w.let(f"add i64 {quotient}, {w.let(f'sext i1 {below} to i64')}")

    def share(self, extent: int) -> tuple[str, str]:
        """This thread's part of a parallel loop."""
        w = self.w
        first = w.let(f"udiv i64 {w.let(f'mul i64 {extent}, %thread')}, %threads")
        following = w.let("add i64 %thread, 1")
        return first, w.let(f"udiv i64 {w.let(f'mul i64 {extent}, {following}')}, %threads")

    # Registers

    def written(self, body: Body) -> list[Register]:
        """The register elements that a body may write, in the order it does."""
        found: dict[Register, None] = {}
        for around, leaf in leaves(body):
            if not self.in_registers(leaf.tensor):
                continue
            lanes = next((Lanes(lp.var, lp.extent) for lp in around
                          if lp.kind == "vector" and lp.extent > 1), Lanes())
            used = {v for a in leaf.index for v in a.variables}
            free = [lp for lp in around if lp.var in used and lp.var != lanes.var]
            for values in itertools.product(*(range(lp.extent) for lp in free)):
                known = dict(zip((lp.var for lp in free), values, strict=True))
                self.point.known.update(known)
                found.setdefault(self.register(leaf.tensor, leaf.index, lanes))
                for name in known:
                    del self.point.known[name]
        return list(found)

    def in_registers(self, tensor: str) -> bool:
        return self.program.tensor(tensor).role == "register" and tensor not in self.on_stack

    def register(self, tensor: str, index: tuple[Affine, ...], lanes: Lanes) -> Register:
        """The key of a register element: its index with the vector variable at 0."""
        place = tuple(self.point.split(a, lanes)[0] for a in index)
        across = any(lanes.var in a.variables for a in index)
        return tensor, place, lanes.count if across else 1

    # Statements

    def leaf(self, leaf: Leaf, lanes: Lanes) -> None:
        mask = self.memory.guard(leaf.where, lanes)
        if isinstance(mask, tuple) and not any(mask):
            return
        tensor = self.program.tensor(leaf.tensor)
        self.fetch(leaf, lanes)
        if self.in_registers(leaf.tensor):
            self.to_register(leaf, lanes, mask)
        elif isinstance(mask, str) and lanes.count == 1:
            self.branch(leaf, tensor, mask)
        else:
            self.to_memory(leaf, tensor, lanes, mask)

    def branch(self, leaf: Leaf, tensor: Tensor, condition: str) -> None:
        """A scalar statement under a run-time guard."""
        self.memory.flush()
        self.memory.forget()
        number = self.w.fresh("")[1:]
        self.w.line(f"  br i1 {condition}, label %then{number}, label %join{number}")
        self.w.start_block(f"then{number}")
        self.to_memory(leaf, tensor, Lanes(), None)
        self.memory.forget()
        self.w.line(f"  br label %join{number}")
        self.w.start_block(f"join{number}")

    def fetch(self, leaf: Leaf, lanes: Lanes) -> None:
        """Hints to fetch what iterations to come read here."""
        for load in loads(leaf.value):
            if load.tensor in self.ahead:
                place = self.memory.place(self.program.tensor(load.tensor), load.index, lanes)
                if (place.pointer, place.constant) not in self.fetched:
                    self.fetched.add((place.pointer, place.constant))
                    at = self.w.displaced(place.pointer, place.constant + self.ahead[load.tensor])
                    self.w.line(f"  call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 3, i32 1)")
                    self.w.declare("void @llvm.prefetch.p0(ptr, i32, i32, i32)")

    def to_memory(self, leaf: Leaf, tensor: Tensor, lanes: Lanes, mask: Mask | None) -> None:
        value = self.value(leaf.value, lanes)
        if isinstance(leaf, Reduce):
            old = self.memory.load(tensor, leaf.index, lanes)
            value = operation(self.w, "add", (old, value), lanes.count)
        self.memory.store(tensor, leaf.index, value, lanes, mask)

    def to_register(self, leaf: Leaf, lanes: Lanes, mask: Mask | None) -> None:
        """A guard that selects elements needs no test: elements it excludes are never read. It is one under which the
        register was set, or whose variables index it. One that selects contributions keeps the old value."""
        register = self.register(leaf.tensor, leaf.index, lanes)
        old = self.registers.get(register, "zeroinitializer" if register[2] > 1 else "0.0")
        new = self.sum(old, leaf.value, lanes) if isinstance(leaf, Reduce) else self.value(leaf.value, lanes)
        if isinstance(leaf, Store):
            self.set_under[register] = leaf.where
        if mask is not None and selects_contributions(leaf):
            tested = tuple(w for w in leaf.where if w not in self.set_under.get(register, ()))
            kept = mask if tested == leaf.where else self.memory.guard(tested, lanes)
            if kept is not None:
                kind, bits = vector_type(lanes.count), vector_type(lanes.count, "i1")
                new = self.w.let(f"select {bits} {mask_text(kept, lanes.count)}, {kind} {new}, {kind} {old}")
        self.registers[register] = new

    def sum(self, old: str, value: Value, lanes: Lanes) -> str:
        if isinstance(value, Op) and value.name == "mul":
            factor, other = self.constants.factor(value)
            if factor == 0:
                return old
            if factor is not None and other is not None:
                return self.scaled_sum(old, factor, self.value(other, lanes), lanes)
            a, b = (self.value(v, lanes) for v in value.values)
            return multiply_add(self.w, a, b, old, lanes.count, self.fused)
        return operation(self.w, "add", (old, self.value(value, lanes)), lanes.count)

    def scaled_sum(self, old: str, factor: float, value: str, lanes: Lanes) -> str:
        """``old + factor value`` by as little as that takes. Where a product or a sum with 1 or -1 comes alone, LLVM
        may fuse it with the sum or product beside it."""
        count, kind = lanes.count, vector_type(lanes.count)
        contract = "contract " if self.fused else ""
        if old in ("zeroinitializer", "0.0", constant(0.0, count)):
            if factor in (1, -1):
                return value if factor == 1 else operation(self.w, "neg", (value,), count)
            return self.w.let(f"fmul {contract}{kind} {value}, {constant(factor, count)}")
        if factor in (1, -1):
            return self.w.let(f"{'fadd' if factor == 1 else 'fsub'} {contract}{kind} {old}, {value}")
        return multiply_add(self.w, value, constant(factor, count), old, count, self.fused)

    def constant(self, load: Load, lanes: Lanes) -> str:
        """An element of a constant tensor: a literal, or from the table in memory."""
        number = self.constants.number(load)
        if number is not None:
            return constant(number, lanes.count)
        return self.memory.load(self.constants.table(load.tensor), load.index, lanes)

    def value(self, value: Value, lanes: Lanes) -> str:
        match value:
            case Const(number):
                return constant(number, lanes.count)
            case Load(name, _) if self.program.tensor(name).role == "constant":
                return self.constant(value, lanes)
            case Load(name, index):
                if not self.in_registers(name):
                    return self.memory.load(self.program.tensor(name), index, lanes)
                register = self.register(name, index, lanes)
                held = self.registers.get(register, "zeroinitializer" if register[2] > 1 else "0.0")
                return splat(self.w, held, lanes.count) if register[2] < lanes.count else held
            case Op(name, operands):
                return operation(self.w, name, [self.value(v, lanes) for v in operands], lanes.count)
        raise AssertionError(value)


def selects_contributions(leaf: Leaf) -> bool:
    """Whether a guard has no variable of a register's index, as 14 f0 + f1 < F has one of acc[f1]."""
    own = {v for a in leaf.index for v in a.variables}
    return any(not w.variables & own for w in leaf.where)


def _on_stack(program: Program, stage: Stage) -> set[str]:
    """Register tensors that a run-time loop or a digit indexes, or that are seen as vectors and as scalars."""
    stacked, seen = set(), dict[str, int]()
    for around, leaf in leaves(stage.body):
        kinds = {lp.var: lp for lp in around}
        for name, index in ((leaf.tensor, leaf.index), *((ld.tensor, ld.index) for ld in loads(leaf.value))):
            if program.tensor(name).role != "register":
                continue
            used = [kinds[v] for a in index for v in a.variables]
            if any(lp.kind in ("parallel", "let") or (lp.kind == "serial" and lp.extent > 1) for lp in used):
                stacked.add(name)
            width = next((lp.extent for lp in used if lp.kind == "vector"), 1)
            if seen.setdefault(name, width) != width:
                stacked.add(name)
    return stacked
