"""The statements of a scheduled nest as LLVM IR: values in registers, sums, what a guard keeps."""

from __future__ import annotations

from convsched.ir import Affine, Program
from convsched.kernels.emit.constants import Constants
from convsched.kernels.emit.forms import Lanes, Point, Reference
from convsched.kernels.emit.memory import Memory
from convsched.kernels.emit.nest import Coefficient, Held, Literal, Operation, Repeated, Statement, Term
from convsched.kernels.emit.vectors import Mask, constant, mask_text, multiply_add, operation, splat, vector_type
from convsched.kernels.emit.writer import Writer
from convsched.machine import Machine

Register = tuple[str, int, int]  # tensor, place of the element in lane 0, lanes


class Statements:
    """Emits statements one after another; the walk over loops sets where they stand."""

    def __init__(self, program: Program, machine: Machine) -> None:
        self.program = program
        self.fused = machine.fma
        self.w = Writer()
        self.point = Point({}, {})
        self.memory = Memory(self.w, self.point, machine.masks)
        self.constants = Constants(program, self.point)
        self.registers: dict[Register, str] = {}
        self.set_under: dict[Register, tuple[Affine, ...]] = {}  # the guards of what last set a register
        self.ahead: dict[str, int] = {}  # elements from what is read of a tensor to what is fetched
        self.fetched: set[tuple[str, int]] = set()

    def register(self, held: Held) -> Register:
        """The register that holds an element at this point."""
        return held.tensor, held.place.at(self.point.known), held.count

    def written(self, repeated: Repeated) -> dict[Register, str]:
        """The registers that a loop's body may write, in the order it does, and what they hold before it."""
        found: dict[Register, str] = {}
        for written in repeated.writes:
            tensor, place, count = self.register(written.first)
            for move in written.moves:
                register = tensor, place + move, count
                found[register] = self.registers.get(register, written.first.empty)
        return found

    def statement(self, statement: Statement) -> None:
        mask = self.memory.guard(statement.guards, statement.lanes) if statement.guards else None
        if isinstance(mask, tuple) and not any(mask):
            return
        if self.ahead:
            self.fetch(statement)
        if isinstance(statement.target, Held):
            self.to_register(statement, statement.target, mask)
        elif isinstance(mask, str) and statement.lanes.count == 1:
            self.branch(statement, statement.target, mask)
        else:
            self.to_memory(statement, statement.target, mask)

    def branch(self, statement: Statement, target: Reference, condition: str) -> None:
        """A scalar statement under a run-time guard."""
        self.memory.flush()
        self.memory.forget()
        number = self.w.fresh("")[1:]
        self.w.line(f"  br i1 {condition}, label %then{number}, label %join{number}")
        self.w.start_block(f"then{number}")
        self.to_memory(statement, target, None)
        self.memory.forget()
        self.w.line(f"  br label %join{number}")
        self.w.start_block(f"join{number}")

    def fetch(self, statement: Statement) -> None:
        """Hints to fetch what iterations to come read here."""
        for name, read in statement.read:
            if name in self.ahead:
                place = self.memory.place(read)
                if (place.pointer, place.constant) not in self.fetched:
                    self.fetched.add((place.pointer, place.constant))
                    at = self.w.displaced(place.pointer, place.constant + self.ahead[name])
                    self.w.line(f"  call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 3, i32 1)")
                    self.w.declare("void @llvm.prefetch.p0(ptr, i32, i32, i32)")

    def to_memory(self, statement: Statement, target: Reference, mask: Mask | None) -> None:
        value = self.value(statement.value, statement.lanes)
        if statement.own is not None:
            old = self.memory.load(statement.own)
            value = operation(self.w, "add", (old, value), statement.lanes.count)
        self.memory.store(target, value, mask)

    def to_register(self, statement: Statement, target: Held, mask: Mask | None) -> None:
        """A guard that selects elements needs no test: elements it excludes are never read. It is one under which the
        register was set, or whose variables index it. One that selects contributions keeps the old value."""
        register, lanes, where = self.register(target), statement.lanes, statement.leaf.where
        if statement.adds:
            old = self.registers.get(register, target.empty)
            new = self.sum(old, statement)
        else:
            new = self.value(statement.value, lanes)
            self.set_under[register] = where
        if mask is not None and statement.contributes:
            under = self.set_under.get(register, ())
            tested = [(w, form) for w, form in statement.guards if w not in under]
            kept = mask if len(tested) == len(where) else self.memory.guard(tested, lanes)
            if kept is not None:
                old = self.registers.get(register, target.empty)
                kind, bits = vector_type(lanes.count), vector_type(lanes.count, "i1")
                new = self.w.let(f"select {bits} {mask_text(kept, lanes.count)}, {kind} {new}, {kind} {old}")
        self.registers[register] = new

    def sum(self, old: str, statement: Statement) -> str:
        """What a register holds, and the statement's value."""
        value, lanes = statement.value, statement.lanes
        if statement.factor is not None and statement.other is not None:
            factor = self.constants.number(statement.factor)
            if factor == 0:
                return old
            if factor is not None:
                return self.scaled_sum(old, factor, self.value(statement.other, lanes), lanes.count)
        if isinstance(value, Operation) and value.name == "mul":
            a, b = [self.value(operand, lanes) for operand in value.operands]
            return multiply_add(self.w, a, b, old, lanes.count, self.fused)
        return operation(self.w, "add", (old, self.value(value, lanes)), lanes.count)

    def scaled_sum(self, old: str, factor: float, value: str, count: int) -> str:
        """``old + factor value`` by as little as that takes. Where a product or a sum with 1 or -1 comes alone, LLVM
        may fuse it with the sum or product beside it."""
        kind = vector_type(count)
        contract = "contract " if self.fused else ""
        if old in ("zeroinitializer", "0.0", constant(0.0, count)):
            if factor in (1, -1):
                return value if factor == 1 else operation(self.w, "neg", (value,), count)
            return self.w.let(f"fmul {contract}{kind} {value}, {constant(factor, count)}")
        if factor in (1, -1):
            return self.w.let(f"{'fadd' if factor == 1 else 'fsub'} {contract}{kind} {old}, {value}")
        return multiply_add(self.w, value, constant(factor, count), old, count, self.fused)

    def value(self, term: Term, lanes: Lanes) -> str:
        if isinstance(term, Reference):
            return self.memory.load(term)
        if isinstance(term, Held):
            held = self.registers.get(self.register(term), term.empty)
            return splat(self.w, held, lanes.count) if term.narrow else held
        if isinstance(term, Operation):
            return operation(self.w, term.name, [self.value(operand, lanes) for operand in term.operands], lanes.count)
        if isinstance(term, Literal):
            return term.text
        return self.element(term, lanes)

    def element(self, element: Coefficient, lanes: Lanes) -> str:
        """An element of a constant tensor: a literal, or from the table in memory."""
        number = self.constants.number(element)
        if number is not None:
            return constant(number, lanes.count)
        assert element.table is not None
        self.constants.use_table(element.tensor)
        return self.memory.load(element.table)
