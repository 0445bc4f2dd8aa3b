"""What lowerings write stages with: tensors of one letter an axis, indices, copies, sums of products."""

from __future__ import annotations

from convsched.ir import (
    Affine,
    Const,
    Index,
    Load,
    Op,
    Reduce,
    Role,
    Stage,
    Store,
    Tensor,
    Value,
    When,
    nested,
    storage_of,
)

ZERO = Const(0.0)


def at(*parts: Affine | str | int) -> Index:
    """An index: a loop, a number or an affine expression for each axis."""
    return tuple(map(Affine.of, parts))


def tensor_of(name: str, letters: str, shape: tuple[int, ...], role: Role,
              order: tuple[str, ...] | None = None, border: tuple[tuple[int, int], ...] = (),
              values: tuple[float, ...] = ()) -> Tensor:
    """A tensor with axes of one letter each, stored in ``order``; a border of no element anywhere is left out."""
    framed = border if any(map(any, border)) else ()
    return Tensor(name, tuple(letters), shape, role, storage_of(tuple(letters), shape, order), framed, values)


def copy(target: str, index: Index, source: str, place: Index, loops: dict[str, int]) -> Stage:
    """The stage ``target[index] = source[place]``."""
    return Stage(target, nested(loops, Store(target, index, Load(source, place))))


def sum_of_products(target: str, index: Index, loops: dict[str, int], inner: dict[str, int],
                    factor: tuple[str, Index], other: tuple[str, Index], start: Value = ZERO,
                    when: When = "run") -> tuple[Stage, Stage]:
    """``target = start + sum over the inner loops of factor * other``, as two stages."""
    product = Op("mul", (Load(*factor), Load(*other)))
    return (Stage(f"{target}.start", nested(loops, Store(target, index, start)), when),
            Stage(target, nested({**loops, **inner}, Reduce(target, index, product)), when))
