"""Affine expressions in loop variables: indices, guards and addresses."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Affine:
    """``sum(coefficient * variable) + constant`` over integers; ``terms`` sorted by name, none zero."""

    terms: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    @staticmethod
    def of(value: Affine | str | int) -> Affine:
        """An affine expression from a variable's name or an integer."""
        if isinstance(value, Affine):
            return value
        return Affine(((value, 1),)) if isinstance(value, str) else Affine((), value)

    @staticmethod
    def total(terms: Iterable[tuple[str, int]], constant: int) -> Affine:
        """The canonical form of a sum: like terms added, zeros dropped."""
        sums: dict[str, int] = {}
        for name, coefficient in terms:
            sums[name] = sums.get(name, 0) + coefficient
        return Affine(tuple(sorted([term for term in sums.items() if term[1]])), constant)

    def __add__(self, other: Affine | str | int) -> Affine:
        if isinstance(other, int):
            return Affine(self.terms, self.constant + other)
        other = Affine.of(other)
        if not other.terms:
            return Affine(self.terms, self.constant + other.constant)
        return Affine.total((*self.terms, *other.terms), self.constant + other.constant)

    def __sub__(self, other: Affine | str | int) -> Affine:
        if isinstance(other, int):
            return Affine(self.terms, self.constant - other)
        other = Affine.of(other)
        if not other.terms:
            return Affine(self.terms, self.constant - other.constant)
        return Affine.total((*self.terms, *[(n, -c) for n, c in other.terms]), self.constant - other.constant)

    def __mul__(self, factor: int) -> Affine:
        return Affine(tuple([(n, c * factor) for n, c in self.terms]) if factor else (), self.constant * factor)

    @property
    def variables(self) -> frozenset[str]:
        """The names of the variables it depends on."""
        return frozenset([n for n, _ in self.terms])

    def coefficient(self, name: str) -> int:
        """The factor of ``name``, 0 where it is absent."""
        for n, c in self.terms:
            if n == name:
                return c
        return 0

    def part(self, names: Iterable[str]) -> Affine:
        """The terms of the given variables, without the constant."""
        keep = set(names)
        return Affine(tuple([t for t in self.terms if t[0] in keep]), 0)

    def without(self, names: Container[str]) -> Affine:
        """The terms of all other variables, and the constant."""
        return Affine(tuple([t for t in self.terms if t[0] not in names]), self.constant)

    def substitute(self, values: Mapping[str, Affine]) -> Affine:
        """Replace variables by affine expressions."""
        for n, _ in self.terms:
            if n in values:
                break
        else:
            return self
        terms: list[tuple[str, int]] = []
        constant = self.constant
        for name, coefficient in self.terms:
            if name in values:
                inner = values[name]
                terms += [(n, c * coefficient) for n, c in inner.terms]
                constant += inner.constant * coefficient
            else:
                terms.append((name, coefficient))
        return Affine.total(terms, constant)

    def bounds(self, extents: Mapping[str, int]) -> tuple[int, int]:
        """The least and greatest value (both inclusive) over ``0 <= var < extent``."""
        low = high = self.constant
        for name, coefficient in self.terms:
            if coefficient < 0:
                low += coefficient * (extents[name] - 1)
            else:
                high += coefficient * (extents[name] - 1)
        return low, high

    def evaluate(self, values: Mapping[str, int]) -> int:
        """Its value at a point."""
        return self.constant + sum(c * values[n] for n, c in self.terms)

    def __str__(self) -> str:
        text = ""
        for name, coefficient in sorted(self.terms, key=lambda t: (-abs(t[1]), t[0])):
            sign = "-" if coefficient < 0 else "+"
            body = name if abs(coefficient) == 1 else f"{abs(coefficient)} {name}"
            text += f" {sign} {body}" if text else (f"-{body}" if coefficient < 0 else body)
        if self.constant or not text:
            sign = "-" if self.constant < 0 else "+"
            text += f" {sign} {abs(self.constant)}" if text else str(self.constant)
        return text


Index = tuple[Affine, ...]
