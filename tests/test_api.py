"""What ``compile`` may be asked for, and what a kernel is besides callable: its texts, its copies."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import convsched as cs
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key, Record
from convsched.errors import ArrayError, CacheWarning, LoweringError, ScheduleError
from convsched.kernels.run.bound import BoundKernel
from convsched.kernels.run.kernel import Kernel
from convsched.kernels.source.code import NumbaCode
from convsched.machine import host
from convsched.options import ACCURACIES, BACKENDS, MAX_THREADS, Accuracy
from convsched.plan.choice import AccuracyWarning
from convsched.plan.families import named
from convsched.plan.plan import Target
from convsched.problem import Problem
from convsched.problem.layout import LAYOUTS, Layout
from convsched.problem.reference import convolve

LAYER = cs.Conv2d(5, 20, 3, padding=1, input_size=(6, 9), activation="relu")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVSCHED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def integers() -> tuple[Any, Any, Any]:
    """x, weight and bias of small integers: every sum is exact."""
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.integers(-3, 4, s).astype(np.float32)
                       for s in (LAYER.input_shape, LAYER.weight_shape, LAYER.bias_shape))  # fmt: skip
    return x, weight, bias


def check(kernel: Kernel | BoundKernel) -> None:
    """The kernel computes the layer, with the weights of ``integers``."""
    x, weight, bias = integers()
    y = kernel(x, weight, bias) if isinstance(kernel, Kernel) else kernel(x)
    np.testing.assert_array_equal(y, convolve(LAYER, x, weight, bias))


def bound(**options: Any) -> BoundKernel:
    _, weight, bias = integers()
    return cs.compile(LAYER, **{"threads": 1, **options}).bind(weight, bias)


def run_python(code: str, *arguments: str) -> str:
    """What a new process prints that runs the code; an error there fails the test."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# What compile takes

@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": ""}, "algorithm='': use one of direct"),
        ({"algorithm": "magic"}, "algorithm='magic': use one of direct"),
        ({"algorithm": ("direct",)}, r"algorithm=\('direct',\): use one of direct"),
        ({"accuracy": "exact"}, "accuracy='exact': use one of strict, normal, fast"),
        ({"accuracy": None}, "accuracy=None: use one of strict, normal, fast"),
        ({"layout": "NCHW"}, "layout='NCHW': use one of nchw, nhwc, nchw16c"),
        ({"layout": ["nchw"]}, r"layout=\['nchw'\]: use one of nchw"),
        ({"layout": np.array(["nchw", "nhwc"])}, "use one of nchw, nhwc, nchw16c"),
        ({"backend": "cuda"}, "backend='cuda': use one of llvm, numba"),
        ({"cache": "x.sqlite"}, "cache=.x.sqlite.: use a convsched.autotune.store.cache.ScheduleCache, None or True"),
        ({"cache": 0}, "cache=0: use a .*ScheduleCache"),
        ({"cache": ScheduleCache}, "cache=<class .*: use a .*ScheduleCache"),
        ({"cache": "x", "schedule": ""}, "cache='x': use a .*ScheduleCache"),
        ({"threads": 0}, "threads=0: use an integer from 1 to 1024, or None for the cores"),
        ({"threads": -1}, "threads=-1: use an integer"),
        ({"threads": 2.0}, "threads=2.0: use an integer"),
        ({"threads": "2"}, "threads='2': use an integer"),
        ({"threads": True}, "threads=True: use an integer"),
        ({"threads": np.True_}, "threads=.*True.*: use an integer"),
        ({"threads": np.array([1, 2])}, "use an integer from 1"),
        ({"threads": MAX_THREADS + 1}, "threads=1025: use an integer from 1 to 1024"),
        ({"threads": 10**6}, "threads=1000000: use an integer from 1 to 1024"),
        ({"memory_limit": -1}, "memory_limit=-1: use bytes of workspace, an integer from 0, or None"),
        ({"memory_limit": 1e6}, "memory_limit=1000000.0: use bytes of workspace"),
        ({"memory_limit": "1M"}, "memory_limit='1M': use bytes of workspace"),
        ({"memory_limit": True}, "memory_limit=True: use bytes of workspace"),
    ],
)
def test_what_compile_does_not_take_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        cs.compile(LAYER, **options)


@pytest.mark.parametrize("layer", [None, "conv2d c=1 m=1 k=1x1 in=1x1", cs.Conv2d, LAYER.input_shape])
def test_what_is_no_layer_is_named(layer: Any) -> None:
    with pytest.raises(LoweringError, match=r"compile takes a Conv2d, a Linear or a convsched\.ir\.Program, not "):
        cs.compile(layer)


@pytest.mark.parametrize("schedule", [5, ["unroll c"], b"unroll c", cs.Schedule])
def test_what_is_no_schedule_is_named(schedule: Any) -> None:
    with pytest.raises(ScheduleError, match="give a Schedule or its text"):
        cs.compile(LAYER, schedule=schedule)


@pytest.mark.parametrize("threads", [np.int64(2), np.uint8(2), np.array(2)])
def test_threads_may_be_any_integer(threads: Any) -> None:
    kernel = cs.compile(LAYER, threads=threads)
    assert type(kernel.threads) is int
    assert kernel.threads == 2
    check(kernel)


def test_the_greatest_number_of_threads_compiles() -> None:
    assert cs.compile(LAYER, threads=MAX_THREADS).threads == MAX_THREADS


def tuned(cache: ScheduleCache, algorithm: str = "direct", schedule: str = "unroll s", hot: float = 1e-6,
          accuracy: Accuracy = "normal", recipe: str = "by hand", layer: Problem = LAYER,
          target: Target | None = None) -> str:  # fmt: skip
    """The schedule of a record that is put into a cache, as tuning on one thread would leave it."""
    target = target or Target(host.machine(), accuracy=accuracy)
    assert cache.put(Record(**vars(Key.of(layer, target)), algorithm=algorithm,
                            recipe=recipe, schedule=schedule, hot=hot, status="ok", time=1.0))  # fmt: skip
    return schedule


def default_of(algorithm: str) -> str:
    """An algorithm's default schedule for the layer."""
    return named(algorithm, LAYER).default(host.machine(), "nchw", 1).schedule(LAYER).text


def test_none_and_true_are_the_cache_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVSCHED_CACHE", str(tmp_path))
    default = cs.compile(LAYER, threads=1).schedule
    choices: tuple[bool | None, ...] = (None, True, False)
    assert {cs.compile(LAYER, threads=1, cache=cache).schedule for cache in choices} == {default}
    schedule = tuned(ScheduleCache())
    for cache in (None, True):
        kernel = cs.compile(LAYER, threads=1, cache=cache)
        assert kernel.schedule.text == schedule
        check(kernel)
    assert cs.compile(LAYER, threads=1).schedule.text == schedule
    assert cs.compile(LAYER, threads=1, cache=False).schedule == default


def test_a_cache_of_ones_own(tmp_path: Path) -> None:
    cache = ScheduleCache(tmp_path / "mine.sqlite")
    schedule = tuned(cache)
    assert cs.compile(LAYER, threads=1, cache=cache).schedule.text == schedule
    assert cs.compile(LAYER, threads=1).schedule.text != schedule


def test_a_remembered_schedule_is_that_of_its_algorithm(tmp_path: Path) -> None:
    cache = ScheduleCache(tmp_path / "mine.sqlite")
    schedule = tuned(cache, "winograd(2,3)", default_of("winograd(2,3)"))
    kernel = cs.compile(LAYER, threads=1, cache=cache)
    assert (kernel.algorithm, kernel.schedule.text) == ("winograd(2,3)", schedule)
    assert "recipe     from the schedule cache: by hand" in kernel.explain()
    x, weight, bias = integers()
    np.testing.assert_allclose(kernel(x, weight, bias), convolve(LAYER, x, weight, bias), rtol=0, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["direct", "winograd(2,3)", "im2col"])
def test_an_algorithm_asked_for_is_looked_up_too(tmp_path: Path, algorithm: str) -> None:
    """Only its own records count; those of others are no reason for a warning."""
    cache = ScheduleCache(tmp_path / "mine.sqlite")
    own = {"direct": tuned(cache, hot=1e-5), "winograd(2,3)": tuned(cache, "winograd(2,3)",
                                                                    default_of("winograd(2,3)"))}  # fmt: skip
    kernel = cs.compile(LAYER, threads=1, cache=cache, algorithm=algorithm)
    assert kernel.algorithm == algorithm
    assert kernel.schedule.text == own.get(algorithm, default_of(algorithm))
    assert ("from the schedule cache" in kernel.explain()) == (algorithm in own)


@pytest.mark.parametrize("changes", [{"cores": 999}, {"stepping": "99", "l2": 1 << 30}, {"design": "another"}], ids=str)
@pytest.mark.parametrize("asked", [{}, {"algorithm": "winograd(2,3)"}, {"memory_limit": 1 << 30},
                                   {"algorithm": "winograd(2,3)", "memory_limit": 1 << 30}], ids=str)
def test_the_record_of_a_near_machine_is_found_whatever_else_is_asked(
        tmp_path: Path, changes: dict[str, Any], asked: dict[str, Any]) -> None:
    cache = ScheduleCache(tmp_path / "mine.sqlite")
    near = Target(replace(host.machine(), **changes))
    schedule = tuned(cache, "winograd(2,3)", default_of("winograd(2,3)"), target=near)
    tuned(cache, "im2col", default_of("im2col"), hot=1.0, target=near)  # slower
    kernel = cs.compile(LAYER, threads=1, cache=cache, **asked)
    assert (kernel.algorithm, kernel.schedule.text, kernel.recipe) == ("winograd(2,3)", schedule, None)


def test_what_is_not_asked_for_on_a_nearer_machine_hides_nothing(tmp_path: Path) -> None:
    """Records are walked from the nearest machine outwards, those that are not asked for passed over."""
    cache = ScheduleCache(tmp_path / "mine.sqlite")
    tuned(cache, "winograd(2,3)", default_of("winograd(2,3)"))
    further = tuned(cache, hot=1e-5, target=Target(replace(host.machine(), cores=999)))
    limit = cs.compile(LAYER, schedule=further, threads=1).workspace_bytes
    asked: tuple[dict[str, Any], ...] = ({"algorithm": "direct"}, {"memory_limit": limit})
    for options in asked:
        assert cs.compile(LAYER, threads=1, cache=cache, **options).schedule.text == further


def test_a_remembered_schedule_stays_within_the_memory_limit(tmp_path: Path) -> None:
    cache = ScheduleCache(tmp_path / "mine.sqlite")
    tuned(cache, "winograd(2,3)", default_of("winograd(2,3)"), hot=1e-6)
    slower = tuned(cache, hot=1e-5)
    limit = cs.compile(LAYER, schedule=slower, threads=1).workspace_bytes
    assert cs.compile(LAYER, threads=1, cache=cache).workspace_bytes > limit
    assert cs.compile(LAYER, threads=1, cache=cache, memory_limit=limit).schedule.text == slower
    assert cs.compile(LAYER, threads=1, cache=cache, memory_limit=limit - 1).recipe is not None


@pytest.mark.parametrize("algorithm", ["winograd(6,3)", "winograd(9,9)", "magic"])
def test_a_record_that_does_not_fit_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   algorithm: str) -> None:
    cache = ScheduleCache(tmp_path / "mine.sqlite")
    with monkeypatch.context() as patch:
        patch.setattr(Record, "check", lambda record: None)  # it was written by a version that knew the algorithm
        tuned(cache, algorithm, accuracy="strict")
    with pytest.warns(CacheWarning, match="accuracy='strict': winograd.6,3.|taps|use one of"):
        kernel = cs.compile(LAYER, threads=1, cache=cache, accuracy="strict")
    assert kernel.recipe is not None


def test_a_record_of_the_most_accurate_algorithm_counts_where_none_fits(tmp_path: Path) -> None:
    layer, cache = cs.Linear(8192, 400), ScheduleCache(tmp_path / "mine.sqlite")
    assert not named("direct", layer).fits("strict")
    tuned(cache, schedule="split m 4 -> m0 m1; unroll m1", accuracy="strict", layer=layer)
    with pytest.warns(AccuracyWarning, match="direct is used") as warned:
        kernel = cs.compile(layer, threads=1, cache=cache, accuracy="strict")
    assert kernel.schedule.text == "split m 4 -> m0 m1; unroll m1"
    assert len(warned) == 1


def test_the_names_agree_with_their_types() -> None:
    assert tuple(LAYOUTS) == get_args(Layout)
    for layout in LAYOUTS:
        assert cs.compile(LAYER, layout=layout, threads=1).layout == layout  # type: ignore[call-overload]
    for accuracy in ACCURACIES:
        assert cs.compile(LAYER, accuracy=accuracy, threads=1).plan.target.accuracy == accuracy


# The texts of a kernel

@pytest.mark.parametrize("backend", BACKENDS)
def test_every_text_is_there_before_the_first_call(backend: Any) -> None:
    kernel = cs.compile(LAYER, backend=backend, schedule="", threads=1)
    for text, part in ((kernel.llvm, "define "), (kernel.assembly, "ret"), (kernel.source, "def run("),
                       (kernel.nest, "conv:"), (kernel.explain(), LAYER.text)):  # fmt: skip
        assert part in text
    check(kernel)


def test_the_numba_backend_compiles_once() -> None:
    """The types that its texts are made for are those of a call."""
    kernel = cs.compile(LAYER, backend="numba", threads=1)
    assert isinstance(kernel.code, NumbaCode)
    before = kernel.llvm
    check(kernel)
    assert len(kernel.code.function.signatures) == 1
    assert kernel.llvm == before


# Copies

DUPLICATES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))]


@pytest.mark.parametrize("duplicate", DUPLICATES, ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"algorithm": "winograd(2,3)"},
        {"threads": 2, "layout": "nchw16c", "accuracy": "fast"}, {"schedule": ""}, {"backend": "numba", "schedule": ""},
        {"schedule": "split m 8 -> m0 m1 tail=mask; layout w m0 c r s m1; reorder m0 e f c r s m1; vectorize m1"},
    ],
    ids=["default", "algorithm", "options", "unscheduled", "numba", "packed"],
)  # fmt: skip
def test_kernels_can_be_copied(options: dict[str, Any], duplicate: Callable[[Any], Any]) -> None:
    conv = bound(**options)
    kernel, other = conv.kernel, duplicate(conv.kernel)
    assert type(other) is type(kernel)
    assert (other.plan, other.plan.recipe, other.plan.origin) == (kernel.plan, kernel.plan.recipe, kernel.plan.origin)
    assert other.code.interface == kernel.code.interface
    again = duplicate(conv)
    assert type(again) is type(conv)
    assert all(array.ctypes.data % 64 == 0 for array in again.weights.values())
    if conv.kernel.layout == "nchw":
        check(other)
        check(again)


def test_a_copy_has_weights_of_its_own() -> None:
    conv = bound()
    other = copy.deepcopy(conv)
    for array in conv.weights.values():
        array[...] = np.nan
    check(other)


def test_a_pickle_runs_in_another_process(tmp_path: Path) -> None:
    file = tmp_path / "conv.pickle"
    file.write_bytes(pickle.dumps(bound(threads=2)))
    code = "import pickle, sys, numpy as np; conv = pickle.load(open(sys.argv[1], 'rb'));"
    x, weight, bias = integers()
    np.save(tmp_path / "x.npy", x)
    run_python(f"{code} np.save(sys.argv[3], conv(np.load(sys.argv[2])))",
               *(str(path) for path in (file, tmp_path / "x.npy", tmp_path / "y.npy")))
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), convolve(LAYER, x, weight, bias))


def test_weights_that_were_packed_otherwise_are_refused() -> None:
    conv = bound()
    remake, (kind, kernel, packing, weights) = conv.__reduce__()
    assert packing
    with pytest.raises(ArrayError, match="packed by another version of convsched; bind them again"):
        remake(kind, kernel, packing[:-1], weights)


def test_layers_are_compiled_on_all_cores_and_equal_ones_once() -> None:
    layers = [cs.Conv2d(4, 8, 3, input_size=(6, width)) for width in (6, 7, 8, 6)] + [cs.Linear(4, 8)]
    kernels = cs.compile_each(layers, threads=1, cache=False)
    assert [kernel.problem for kernel in kernels] == layers
    assert kernels[0] is kernels[3]
    for layer, kernel in zip(layers, kernels, strict=True):
        x, weight, bias = (np.ones(shape, np.float32) for shape in (layer.input_shape, layer.weight_shape, layer.M))
        np.testing.assert_array_equal(kernel(x, weight, bias), convolve(layer, x, weight, bias))
    assert cs.compile_each([]) == []


def test_the_first_layer_that_fails_is_told() -> None:
    with pytest.raises(LoweringError, match="fully connected"):
        cs.compile_each([cs.Conv2d(4, 8, 3, input_size=6), cs.Linear(4, 8)], algorithm="winograd")
    with pytest.raises(LoweringError, match="not dict"):
        cs.compile_each([{}])  # type: ignore[list-item]
    with pytest.raises(LoweringError, match="use compile for one"):
        cs.compile_each(cs.Linear(4, 8))  # type: ignore[arg-type]
