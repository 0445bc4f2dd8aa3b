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

from collections.abc import Mapping

from convsched.ir import Affine, Program, Stage, leaves
from convsched.ir.ahead import fetches
from convsched.kernels.emit.addresses import base
from convsched.kernels.emit.nest import Digit, Nest, Node, Repeated, Statement, Unrolled
from convsched.kernels.emit.statements import Register, Statements
from convsched.kernels.emit.vectors import vector_type
from convsched.kernels.signature import arguments, names, symbols
from convsched.machine import Machine

# Between unrolled iterations that add to the same registers: loads stay in their iteration. The scheduler of
# LLVM otherwise starts the next one's early, and a tile that fills the registers spills.
BARRIER = '  call void asm sideeffect "", "~{memory}"()'


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


class _Emitter(Statements):
    """Walks one stage."""

    def __init__(self, program: Program, stage: Stage, machine: Machine) -> None:
        super().__init__(program, machine)
        self.stage = stage
        self.nest = Nest(program, stage, machine.lanes)
        self.granted = self.memory.granted  # guards that the bounds of loops ensure

    def function(self, symbol: str) -> str:
        """The text of the stage's function."""
        used = {name for _, leaf in leaves(self.stage.body) for name in names(leaf)}
        prologue = []
        for position, tensor in enumerate(arguments(self.program)):
            if tensor.name in used:
                prologue += [f"  %{tensor.name}.slot = getelementptr ptr, ptr %tensors, i64 {position}",
                             f"  {base(tensor.name)} = load ptr, ptr %{tensor.name}.slot, align 8"]
        prologue += [f"  {base(name)} = alloca [{self.program.tensor(name).elements} x float], align 64"
                     for name in sorted(self.nest.on_stack)]
        self.body(self.nest.body)
        self.memory.flush()
        prologue += [f"  {base(name)} = getelementptr float, ptr @{base(name)[1:]}, i64 0"
                     for name in self.constants.tables]
        scope = self.w.scopes[0]
        head = f"define void @{symbol}(ptr %tensors, i64 %thread, i64 %threads) #0 {{"
        return "\n".join([head, "entry:", *prologue, *scope.hoisted, *scope.lines, "  ret void", "}"])

    # Loops

    def body(self, body: list[Node]) -> None:
        for node in body:
            if isinstance(node, Statement):
                self.statement(node)
            elif isinstance(node, Unrolled):
                self.unrolled(node)
            elif isinstance(node, Digit):
                self.digit(node)
            else:
                self.repeated(node)

    def unrolled(self, unrolled: Unrolled) -> None:
        """A loop written out, but for iterations that add nothing."""
        known, var, body = self.point.known, unrolled.loop.var, unrolled.body
        for value in self.constants.useful(unrolled):
            if value and unrolled.sums:
                self.w.line(BARRIER)
            known[var] = value
            self.body(body)
        del known[var]

    def digit(self, digit: Digit) -> None:
        """Statements for which a variable has a value: known, or computed where the loops it depends on begin."""
        value = self.memory.digit(digit)
        values: dict[str, int] | dict[str, str] = self.point.known if isinstance(value, int) else self.point.dynamic
        values[digit.named.var] = value  # type: ignore[assignment]
        self.body(digit.body)
        del values[digit.named.var]

    def repeated(self, repeated: Repeated) -> None:
        """A loop with its test at the bottom; register tensors written inside are phis at its head."""
        self.memory.flush()
        self.memory.forget()
        w, loop = self.w, repeated.loop
        number = w.fresh("")[1:]
        var, head, done = f"%{loop.var}.{number}", f"head{number}", f"done{number}"
        first, last = "0", str(loop.extent)
        if loop.kind == "parallel":
            first, last = self.share(loop.extent)
        guards = self.guards(repeated)
        first, last = self.bounded(repeated, first, last, guards)
        if loop.kind == "parallel" or guards:
            some = w.let(f"icmp slt i64 {first}, {last}")
            w.line(f"  br i1 {some}, label %{head}, label %{done}")
        else:
            w.line(f"  br label %{head}")
        before = w.label
        self.granted += guards
        carried = self.written(repeated)
        phis = {r: w.fresh("a") for r in carried}
        outside = dict(self.registers)
        self.registers.update(phis)
        self.point.dynamic[loop.var] = var
        w.open_scope(loop.var)
        w.label = head
        around, self.ahead = self.ahead, {**self.ahead, **fetches(self.program, loop)}
        self.body(repeated.body)
        self.ahead = around
        self.memory.flush()
        self.memory.forget()
        following = w.let(f"add nuw nsw i64 {var}, 1")
        more = w.let(f"icmp slt i64 {following}, {last}")
        w.line(f"  br i1 {more}, label %{head}, label %{done}")
        scope = w.close_scope()
        lines = [f"{head}:", f"  {var} = phi i64 [ {first}, %{before} ], [ {following}, %{w.label} ]"]
        for register, phi in phis.items():
            kind = vector_type(register[2])
            lines.append(f"  {phi} = phi {kind} [ {carried[register]}, %{before} ], "
                         f"[ {self.registers[register]}, %{w.label} ]")
        w.lines += [*lines, *scope.hoisted, *scope.lines]
        latch = w.label
        w.start_block(done)
        if loop.kind == "parallel":  # a thread may have no iteration: nothing from inside is known after it
            self.registers = outside
        elif guards:  # nor may there be one for this point
            self.join(carried, before, latch)
        del self.point.dynamic[loop.var], self.granted[len(self.granted) - len(guards):]

    def join(self, carried: Mapping[Register, str], before: str, latch: str) -> None:
        """Registers after a loop that may have no iteration: as they were before it, or as it leaves them."""
        for register, old in carried.items():
            after = self.w.fresh("a")
            self.w.line(f"  {after} = phi {vector_type(register[2])} [ {old}, %{before} ], "
                        f"[ {self.registers[register]}, %{latch} ]")
            self.registers[register] = after

    def guards(self, repeated: Repeated) -> list[Affine]:
        """The guards that all statements of a run-time loop share and that bound its variable: those that
        may fail, and depend on nothing inside."""
        known = self.point.known
        return [form.affine for form in repeated.guards if form.at(known) + form.high >= 0]

    def bounded(self, repeated: Repeated, first: str, last: str, guards: list[Affine]) -> tuple[str, str]:
        """The iterations for which the guards hold: ``k v + rest < 0`` is ``v < ceil(-rest / k)``, and for a
        negative k, ``v > floor(rest / -k)``."""
        w, var = self.w, repeated.loop.var
        for guard in guards:
            k = guard.coefficient(var)
            rest = self.memory.value(repeated.site.form(guard - Affine.of(var) * k), 1)
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
