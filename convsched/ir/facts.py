"""What is known of a statement and of all inside it: kept with each, so that what looks for a loop or a tensor, or
checks a program, walks only where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Facts(NamedTuple):
    """Of a statement or several: what they touch and what loops they are in or of."""

    tensors: frozenset[str]  # that are touched
    names: frozenset[str] = frozenset()  # of loops
    kinds: frozenset[str] = frozenset()  # of loops
    depth: int = 0  # the most loops around a statement
    statements: int = 1  # that are not loops
    guards: frozenset[str] = frozenset()  # variables in conditions
    is_plain: bool = True  # each loop has statements, and none has a condition: there is nothing to leave out
    is_nested_well: bool = True  # no loop is in a vector loop, and no parallel loop in another

    def under(self, var: str, kind: str) -> Facts:
        """The same of a loop that holds the statements, or of a value given to them (of kind "let")."""
        names = self.names | {var}
        kinds = self.kinds if kind in self.kinds else self.kinds | {kind}
        is_nested_well = self.is_nested_well and (
            self.depth == 0 if kind == "vector" else kind != "parallel" or kind not in self.kinds)
        return Facts(self.tensors, names, kinds, self.depth + 1, self.statements, self.guards, self.is_plain,
                     is_nested_well)


NOTHING = Facts(frozenset(), statements=0, is_plain=False)


def together(found: Sequence[Facts]) -> Facts:
    """The facts of statements one after another."""
    if not found:
        return NOTHING
    if len(found) == 1:
        return found[0]
    tensors, names, kinds, depths, counts, guards, plain, nested = zip(*found, strict=True)
    return Facts(tensors[0].union(*tensors[1:]), names[0].union(*names[1:]), kinds[0].union(*kinds[1:]), max(depths),
                 sum(counts), guards[0].union(*guards[1:]), all(plain), all(nested))
