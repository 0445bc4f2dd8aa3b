"""The loop-nest IR: see ``grammar`` for the whole of it on one screen."""

from convsched.ir.affine import Affine, Index
from convsched.ir.grammar import (
    Block, Body, Const, Kind, Leaf, Let, Load, Loop, OPS, Op, Path, Program, Reduce, Role, Stage,
    Statement, StorageAxis, Store, Tensor, Value, When, leaves, leaves_of, loads, storage_of)
from convsched.ir.walk import (
    find_loops, holding, loop_names, map_indices, map_leaves,
    map_loops, map_value, matrix_of, nested, rebuilt, substitute)

__all__ = [
    "Affine", "Block", "Body", "Const", "Index", "Kind", "Leaf", "Let", "Load", "Loop", "OPS", "Op", "Path", "Program",
    "Reduce",
    "Role", "Stage", "Statement", "StorageAxis", "Store", "Tensor", "Value", "When", "find_loops", "holding",
    "leaves", "leaves_of", "loads", "loop_names", "map_indices", "map_leaves", "map_loops", "map_value", "matrix_of",
    "nested", "rebuilt", "storage_of", "substitute",
]
