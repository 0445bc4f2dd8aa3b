"""The machine code of hot loops: full-width multiply-adds, as many as the tile says, and no vector spills."""

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest

from convsched.ir import Reduce, leaves
from convsched.kernels import jit
from convsched.kernels.emit.llvm import emit
from convsched.lower.direct import lower_direct
from convsched.machine import Isa, Machine, host
from convsched.plan.defaults import default_recipe
from convsched.problem import Conv2d
from convsched.problem.layout import LAYOUTS
from convsched.recipes.direct import Channels
from convsched.schedule import apply

LAYERS = {
    "64x56x56 3x3": Conv2d(64, 64, 3, padding=1, input_size=56),
    "256x14x14 3x3": Conv2d(256, 256, 3, padding=1, input_size=14),
    "512x14x14 1x1": Conv2d(512, 512, 1, input_size=14),
    "256x28x28 1x1": Conv2d(256, 256, 1, input_size=28),
}
REGISTER: dict[str, str] = {"avx512": "%zmm", "avx2": "%ymm"}

pytestmark = pytest.mark.skipif(host.machine().isa not in ("avx512", "avx2", "sse"), reason="not an x86-64")


@dataclass(frozen=True)
class Function:
    """The instructions of one function, and its loops as (first, last) line, innermost ones only."""

    lines: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    @property
    def has_frame(self) -> bool:
        """Whether %rbp is the frame's base rather than one more pointer."""
        return any(re.fullmatch(r"movq\s+%rsp,\s*%rbp", line) for line in self.lines)

    def loop_with_most_fmas(self) -> tuple[str, ...]:
        bodies = [self.lines[first:last + 1] for first, last in self.loops]
        return max(bodies, key=lambda body: len(fmas(body)), default=())


def functions(assembly: str) -> list[Function]:
    """The functions of an AT&T listing. A loop is a jump to a label above it."""
    found = []
    for text in re.split(r"^(?=stage_\d+:)", assembly, flags=re.M)[1:]:
        lines = tuple(line.split("#")[0].strip() for line in text.splitlines())
        labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
        jumps = [(labels.get(match[1], len(lines)), at) for at, line in enumerate(lines)
                 if (match := re.fullmatch(r"j[a-z]+\s+(\S+)", line))]  # fmt: skip
        loops = [(first, last) for first, last in jumps if first < last]
        inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        found.append(Function(lines, tuple(inner)))
    return found


def fmas(body: tuple[str, ...]) -> list[str]:
    return [line for line in body if re.match(r"vfn?m(add|sub)", line)]


def spills(function: Function, body: tuple[str, ...]) -> list[str]:
    """Moves of whole vector registers from or to the stack, and arithmetic on operands kept there."""
    bases = r"rsp|rbp" if function.has_frame else r"rsp"
    return [line for line in body if re.search(rf"\(%({bases})\b", line) and re.search(r"%[xyz]mm", line)]


def compiled(problem: Conv2d, isa: Isa, layout: Any) -> tuple[Channels, str]:
    machine = Machine.example(isa)
    recipe = default_recipe(problem, machine, layout, 1)
    assert isinstance(recipe, Channels)
    program = apply(lower_direct(problem, layout), recipe.schedule(problem, layout))
    return recipe, jit.assembly(emit(program, machine), machine)


@pytest.mark.parametrize("layout", ["nchw", "nchw16c"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_the_hot_loop_is_full_width_multiply_adds_without_spills(isa: Isa, layer: str, layout: Any) -> None:
    recipe, assembly = compiled(LAYERS[layer], isa, layout)
    function = max(functions(assembly), key=lambda f: len(fmas(f.loop_with_most_fmas())))
    hot = function.loop_with_most_fmas()
    operations = fmas(hot)
    assert len(operations) == recipe.vectors * recipe.rows * recipe.pixels * recipe.unroll
    assert all(REGISTER[isa] in line and re.match(r"vfmadd\d+ps\b", line) for line in operations)
    assert not spills(function, hot), recipe


@pytest.mark.parametrize(("isa", "problem"), [
    ("avx512", Conv2d(16, 8, 5, padding=2, input_size=84)),
    ("avx512", Conv2d(8, 8, (3, 39), padding=(1, 19), input_size=(20, 84))),
    ("avx512", Conv2d(240, 60, 3, padding=1, groups=3, input_size=28)),
    ("avx512", Conv2d(16, 20, 3, padding=(1, 36), dilation=(1, 36), input_size=(56, 33))),
    ("avx2", Conv2d(16, 22, 5, padding=2, input_size=48)),
    ("avx2", Conv2d(16, 20, 3, padding=(36, 1), dilation=(36, 1), input_size=(9, 48))),
], ids=["half a vector", "39 taps", "groups of 20", "dilated beyond the width", "22 channels", "beyond the height"])
def test_a_remainder_of_channels_stays_in_registers_where_padding_is_left_out(isa: Isa, problem: Conv2d) -> None:
    recipe, assembly = compiled(problem, isa, "nchw")
    assert "h" in recipe.skip
    loops = [(function, function.lines[first:last + 1]) for function in functions(assembly)
             for first, last in function.loops]
    sums = [(function, loop) for function, loop in loops if fmas(loop)]
    assert sums
    assert not [line for function, loop in sums for line in spills(function, loop)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("problem", [
    Conv2d(64, 64, 3, padding=36, dilation=36, input_size=32),
    Conv2d(64, 64, 3, padding=40, dilation=40, input_size=33),
    Conv2d(16, 32, (1, 7), padding=(0, 99), dilation=(1, 33), input_size=(4, 33)),
], ids=["rows that collide", "rows that do not", "seven taps"])
def test_a_dilation_beyond_the_image_leaves_products_out_both_ways(problem: Conv2d, layout: Any) -> None:
    """The centre's taps alone meet the input, so that only their products are left."""
    recipe = default_recipe(problem, Machine.example("avx512"), layout, 1)
    assert isinstance(recipe, Channels)
    assert (recipe.pack, recipe.skip) == ("none", "hw")
    program = apply(lower_direct(problem, layout), recipe.schedule(problem, layout))
    sums = [prod(loop.extent for loop in path) for stage in program.stages for path, leaf in leaves(stage.body)
            if isinstance(leaf, Reduce)]
    assert sum(sums) <= 3 * problem.macs // (problem.R * problem.S)  # rows are left out by the bounds of a loop


def test_the_reader_of_assembly_sees_loops_fmas_and_spills() -> None:
    listing = """
\t.text
stage_0:
\tmovq\t%rsp, %rbp
.LBB0_1:                                # %head
.LBB0_2:                                # =>This Inner Loop Header: Depth=2
\tvfmadd231ps\t%zmm0, %zmm1, %zmm2
\tvfmadd231ps\t(%rdi){1to16}, %zmm1, %zmm3
\tvmovups\t%zmm3, -64(%rsp)               # 64-byte Spill
\tvmovups\t32(%rbp), %zmm4
\tvbroadcastss\t(%rax), %zmm5
\tmovq\t8(%rsp), %rax
\tjl\t.LBB0_2
\tjmp\t.LBB0_1
\tretq
"""
    (function,) = functions(listing)
    hot = function.loop_with_most_fmas()
    assert len(fmas(hot)) == 2
    assert [line.split()[0] for line in spills(function, hot)] == ["vmovups", "vmovups"]
    (pointer,) = functions(listing.replace("movq\t%rsp, %rbp", "nop"))
    assert len(spills(pointer, pointer.loop_with_most_fmas())) == 1
