"""Every error convsched raises on purpose: what was asked, where, and how to put it right.

The arguments of an error are kept in `args`, so that it survives pickling between worker processes.
"""

from __future__ import annotations

SHOWN_CHARACTERS = 300  # of a value in a message; the longest texts of layers have some 150


class ConvschedError(Exception):
    """The base of all errors raised on purpose."""


def shortened(value: object) -> str:
    """A value as messages show it: its repr, of which a long one is cut in the middle.

    >>> shortened("9" * 1000)
    "'999999999999999999999999999999...999999999999999999999999999999'"
    """
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "..."
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:31]}...{text[-31:]}"


class ProblemError(ConvschedError, ValueError):
    """A parameter of a problem that breaks a rule.

    >>> print(ProblemError("Conv2d", "groups", 3, "in_channels=64 is not a multiple of groups"))
    Conv2d(groups=3): in_channels=64 is not a multiple of groups
    """

    def __init__(self, problem: str, parameter: str, value: object, rule: str) -> None:
        super().__init__(problem, parameter, value, rule)
        self.problem = problem
        self.parameter = parameter
        self.value = value
        self.rule = rule

    def __str__(self) -> str:
        return f"{self.problem}({self.parameter}={shortened(self.value)}): {self.rule}"


class ScheduleError(ConvschedError, ValueError):
    """A schedule step that does not fit the nest; `nest` is the printed nest with the loop marked.

    >>> print(ScheduleError("split c by 24", "64 is not a multiple", 'use tail="peel"', "for c < 64: ..."))
    split c by 24: 64 is not a multiple; use tail="peel"
    for c < 64: ...
    """

    def __init__(self, step: str, why: str, fix: str, nest: str = "") -> None:
        super().__init__(step, why, fix, nest)
        self.step = step
        self.why = why
        self.fix = fix
        self.nest = nest

    def __str__(self) -> str:
        message = f"{self.step}: {self.why}; {self.fix}" if self.fix else f"{self.step}: {self.why}"
        return f"{message}\n{self.nest}" if self.nest else message


class ArrayError(ConvschedError, ValueError):
    """An array given to a kernel whose shape, dtype or memory does not fit the problem."""


class MachineError(ConvschedError, ValueError):
    """A setting from the environment that this machine cannot follow."""


class VerifyError(ConvschedError):
    """A program that breaks a rule of the IR."""


class LoweringError(ConvschedError):
    """An algorithm that cannot compute a problem."""


class ModelError(ConvschedError):
    """A model, network or image that is not known or cannot be read."""


class ModelWarning(UserWarning):
    """A model file whose data are not what they should be, such as weights that are NaN."""


class CacheWarning(UserWarning):
    """A cache, or a part of it, that is not used; compilation goes on without."""
