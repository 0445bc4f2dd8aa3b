"""Accuracy as a user meets it: predicted before compiling, measured on one's own data, and held by every class."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest

import convsched as cs
from convsched.algebra.accuracy import BOUNDS, Prediction
from convsched.errors import ArrayError, LoweringError
from convsched.kernels.run.bound import BoundKernel
from convsched.machine import Machine
from convsched.networks.known import NETWORKS, network
from convsched.options import ACCURACIES
from convsched.plan.choice import AccuracyWarning, choices, choose
from convsched.plan.families import FAMILIES, applicable, named
from convsched.plan.plan import Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import LAYOUTS, to_layout
from convsched.problem.reference import convolve

LAYER = Conv2d(64, 32, 3, padding=1, input_size=(14, 18))
KINDS = ("normal", "relu", "mean", "huge")
MACHINE = Machine.example("avx512")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVSCHED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def arrays(problem: Problem, kind: str = "normal") -> tuple[Any, Any, Any]:
    """x, weight and bias: independent; x without negatives; far from zero; with one channel a thousand times more."""
    rng = np.random.default_rng(5)
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32)
                       for shape in (problem.input_shape, problem.weight_shape, problem.bias_shape))
    if kind == "relu":
        x = np.maximum(x, 0)
    if kind == "mean":
        x += 10
    if kind == "huge":
        x[:, problem.C // 3] *= 1000
    return x, weight, bias


def bound(problem: Problem, algorithm: str, kind: str = "normal", **options: Any) -> tuple[BoundKernel, Any]:
    x, weight, bias = arrays(problem, kind)
    kernel = cs.compile(problem, algorithm=algorithm, threads=1, cache=False, accuracy="fast", **options)
    return kernel.bind(weight, bias), x


# The classes hold

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*sorted(FAMILIES), "winograd(2,3)", "winograd(6,3)"])
def test_each_algorithm_stays_within_its_class(name: str, kind: str) -> None:
    """One huge channel is a sum over few channels: its errors have longer tails than those of many."""
    problem = LAYER
    if name not in {one.name.split("(")[0] for one in applicable(LAYER)} and "(" not in name:
        problem = Conv2d(64, 32, 1, input_size=(14, 18))  # what products of matrices apply to
    conv, x = bound(problem, name, kind)
    prediction, found = conv.kernel.predicted_error, conv.measured_error(x)
    assert prediction.accuracy is not None
    assert 0 < found < prediction.worst
    assert found < BOUNDS[prediction.accuracy]
    assert found < 1.5 * (prediction.adverse if kind == "huge" else prediction.expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "accuracy"), [
    ("direct", "strict"), ("im2col", "strict"), ("winograd(2,3)", "strict"), ("winograd(4,3)", "normal"),
    ("winograd(6,3)", "fast"),
])
def test_the_usual_classes_hold_for_all_data(name: str, accuracy: Any, kind: str) -> None:
    conv, x = bound(LAYER, name, kind)
    assert conv.kernel.predicted_error.allowed(accuracy)
    assert conv.measured_error(x) < BOUNDS[accuracy]


@pytest.mark.parametrize("kind", KINDS)
def test_large_winograd_tiles_against_direct(kind: str) -> None:
    """At most 2.5 times the error; the greatest of many is itself known to some ten percent only."""
    errors = []
    for name in ("direct", "winograd(4,3)"):
        conv, x = bound(LAYER, name, kind)
        _, weight, bias = arrays(LAYER, kind)
        difference = conv(x) - convolve(LAYER, x, weight, bias)
        errors.append(float(np.sqrt(np.mean(np.square(difference)))))
    assert errors[1] < 2.5 * errors[0]


@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_what_is_chosen_stays_within_the_class(accuracy: Any) -> None:
    x, weight, bias = arrays(LAYER)
    kernel = cs.compile(LAYER, threads=1, cache=False, accuracy=accuracy)
    assert kernel.predicted_error.allowed(accuracy)
    assert kernel.bind(weight, bias).measured_error(x) < BOUNDS[accuracy]


@pytest.mark.parametrize("problem", [Linear(300, 5, batch_size=3), Conv2d(8, 8, 3, groups=4, input_size=7)])
def test_predictions_count_the_products_of_an_output(problem: Problem) -> None:
    one = named("direct", problem)
    assert (one.terms, one.outputs) == ((300, 15) if isinstance(problem, Linear) else (18, 200))
    assert one.prediction == one.predict(one.terms, one.outputs)
    assert isinstance(cs.compile(problem, threads=1, cache=False).predicted_error, Prediction)


@pytest.mark.parametrize("name", NETWORKS)
def test_direct_fits_the_default_class_for_every_layer_of_known_networks(name: str) -> None:
    assert not [layer.problem.text for layer in network(name).layers
                if not named("direct", layer.problem).fits("normal")]


def test_the_next_round_numbers_decide_nothing_wrongly() -> None:
    for channels in (1, 2, 3, 64, 65, 200, 256, 1400, 1500, 1600, 2048, 2049, 40_000, 60_000):
        one = named("direct", Linear(channels, 300, batch_size=7))
        for accuracy in ACCURACIES:
            assert one.fits(accuracy) == one.prediction.allowed(accuracy)


# Refusals

@pytest.mark.parametrize(("name", "accuracy", "message"), [
    ("winograd(2,3)", "strict", "winograd.2,3. makes NaN of finite outputs beside an Inf .*; use accuracy="),
    ("winograd(6,3)", "normal", 'winograd.6,3. has an expected error of .* class allows 5e-05; use accuracy="fast"'),
    ("winograd(8,3)", "fast", "the class allows 0.0002; no class takes it: use algorithm=None"),
])
def test_a_named_algorithm_that_does_not_fit_is_refused(name: str, accuracy: Any, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        cs.compile(Conv2d(64, 16, 3, input_size=14), algorithm=name, accuracy=accuracy, threads=1)


@pytest.mark.parametrize("options", [{"algorithm": "direct"}, {"schedule": ""}])
def test_direct_sums_may_be_too_long_for_a_class(options: dict[str, Any]) -> None:
    long = Linear(8192, 400)
    with pytest.raises(LoweringError, match="accuracy='strict': direct has an expected error"):
        cs.compile(long, accuracy="strict", threads=1, **options)
    with pytest.warns(AccuracyWarning, match="no algorithm that keeps Inf .* within accuracy='strict'.*; direct"):
        kernel = cs.compile(long, accuracy="strict", threads=1, cache=False)
    assert kernel.algorithm == "direct"
    assert kernel.predicted_error.accuracy == "normal"


@pytest.mark.parametrize("layer", [Linear(8192, 400), Conv2d(2048, 512, 1, input_size=7)], ids=str)
def test_the_warning_tells_an_error_beyond_the_class_and_the_class_that_allows_it(layer: Problem) -> None:
    with pytest.warns(AccuracyWarning) as warned:
        kernel = cs.compile(layer, accuracy="strict", threads=1, cache=False)
    found = re.search(r"direct is used, with ([\d.e-]+); accuracy='normal' allows it", str(warned[0].message))
    assert found is not None
    assert float(found[1]) == pytest.approx(kernel.predicted_error.greatest, rel=0.06)
    assert BOUNDS["strict"] < kernel.predicted_error.greatest <= BOUNDS["normal"]
    assert warned[0].filename == __file__  # where the layer was compiled


# What is chosen without measuring

@pytest.mark.parametrize(("problem", "algorithm"), [
    (Conv2d(64, 64, 3, padding=1, input_size=56), "winograd(4,3)"),
    (Conv2d(128, 128, 3, padding=1, input_size=28), "winograd(4,3)"),
    (Conv2d(256, 256, 3, padding=1, input_size=14), "winograd(4,3)"),
    (Conv2d(512, 512, 3, padding=1, input_size=7), "direct"),  # four times the weights, for one output each
    (Conv2d(32, 96, 5, padding=2, input_size=27), "winograd(2,5)"),
    (Conv2d(160, 160, (1, 7), padding=(0, 3), input_size=17), "winograd(4,7)"),
    (Conv2d(96, 256, 5, padding=2, groups=2, input_size=27), "winograd(2,5)"),
    (Conv2d(3, 64, 3, padding=1, input_size=224), "direct"),
    (Conv2d(64, 10, 3, padding=1, input_size=56), "direct"),
    (Conv2d(64, 64, 1, input_size=56), "direct"),
    (Conv2d(64, 64, 3, stride=2, input_size=56), "direct"),
    (Conv2d(64, 64, 3, groups=64, input_size=56), "direct"),
    (Linear(256, 256), "direct"),
])
def test_the_choice_for_common_layers(problem: Problem, algorithm: str) -> None:
    assert choose(problem, Target(MACHINE)).name == algorithm


@pytest.mark.parametrize(("problem", "algorithm"), [
    (Conv2d(64, 64, 3, padding=1, input_size=56), "winograd(4,3)"),
    (Conv2d(128, 32, 3, padding=1, input_size=7), "winograd(4,3)"),  # measured 1.6 times direct
    (Conv2d(32, 128, 5, padding=2, input_size=13), "winograd(2,5)"),  # 1.4
    (Conv2d(1024, 2048, 1, 2, input_size=14), "direct"),
    (Conv2d(64, 64, 3, groups=64, input_size=56), "direct"),
])
def test_the_choice_with_sixteen_registers(problem: Problem, algorithm: str) -> None:
    assert choose(problem, Target(Machine.example("avx2"))).name == algorithm


def test_a_strict_class_takes_what_keeps_inf_and_nan_where_they_belong() -> None:
    layer = Conv2d(128, 128, 3, padding=1, input_size=14)
    assert named("winograd(2,3)", layer).prediction.allowed("strict")
    assert not named("winograd(2,3)", layer).fits("strict")
    assert named("winograd(2,3)", layer).fits("normal")
    assert [one.name for one in choices(layer, Target(MACHINE, accuracy="strict"))] == ["direct", "im2col"]
    fast = [one.name for one in choices(layer, Target(MACHINE, accuracy="fast"))]
    assert fast[:2] == ["winograd(5,3)", "winograd(4,3)"]


def test_direct_comes_before_what_has_no_estimate() -> None:
    for problem in (LAYER, Conv2d(4, 4, 3, input_size=9), Linear(8, 8)):
        names = [one.name for one in choices(problem, Target(MACHINE, accuracy="fast"))]
        known = [bool(np.isfinite(named(name, problem).estimate(MACHINE, "nchw", 1))) for name in names]
        assert len(set(names)) == len(names)
        assert known[names.index("direct")]
        assert known == sorted(known, reverse=True)


def test_more_threads_than_blocks_do_not_help_winograd() -> None:
    one = named("winograd", Conv2d(64, 64, 3, padding=1, input_size=8))
    assert one.estimate(MACHINE, "nchw", 2) == one.estimate(MACHINE, "nchw", 64)


# Measured on one's own data

@pytest.mark.parametrize("layout", LAYOUTS)
def test_measured_error_is_that_of_a_call(layout: Any) -> None:
    problem = Conv2d(20, 20, 3, padding=1, input_size=9, activation="relu", residual=True)
    x, weight, bias = arrays(problem)
    residual = np.random.default_rng(6).standard_normal(problem.output_shape).astype(np.float32)
    conv = cs.compile(problem, threads=1, layout=layout, cache=False).bind(weight, bias)
    y = conv(to_layout(x, layout), residual=to_layout(residual, layout))
    truth = convolve(problem, x, weight, bias, residual)
    laid: Any = to_layout(truth.astype(np.float64), layout)
    expected = np.abs(y - laid).max() / np.sqrt(np.mean(truth**2))
    assert conv.measured_error(to_layout(x, layout), to_layout(residual, layout)) == pytest.approx(expected)
    with pytest.raises(ArrayError, match="residual is missing"):
        conv.measured_error(to_layout(x, layout))


def test_the_given_weights_are_not_copied() -> None:
    x, weight, bias = arrays(LAYER)
    conv = cs.compile(LAYER, threads=1, cache=False).bind(weight, bias)
    assert conv.given is not None
    assert conv.given[0] is weight
    assert conv.given[1] is bias
    with pytest.raises(ArrayError, match=r"packed weights only; bind the weights again: conv.kernel.bind\(weight"):
        copy.copy(conv).measured_error(x)


@pytest.mark.parametrize(("value", "error"), [(0, 0), (np.nan, np.nan), (np.inf, np.nan)])
def test_measured_errors_of_data_without_a_scale(value: float, error: float) -> None:
    problem = Linear(5, 3, bias=False)
    weight = np.ones(problem.weight_shape, np.float32)
    conv = cs.compile(problem, threads=1, cache=False).bind(weight)
    found = conv.measured_error(np.full(problem.input_shape, value, np.float32))
    np.testing.assert_equal(found, float(error))


# Memory

def test_blocks_are_made_smaller_to_stay_within_a_limit() -> None:
    free = cs.compile(LAYER, algorithm="winograd", threads=1, cache=False)
    kernel = cs.compile(LAYER, algorithm="winograd", threads=1, cache=False, memory_limit=free.workspace_bytes - 1)
    assert 0 < kernel.workspace_bytes < free.workspace_bytes
    x, weight, bias = arrays(LAYER)
    assert kernel.bind(weight, bias).measured_error(x) < BOUNDS["normal"]
    same = cs.compile(LAYER, threads=1, cache=False, memory_limit=free.workspace_bytes)
    assert (same.algorithm, same.schedule) == (free.algorithm, free.schedule)


def test_an_algorithm_beyond_the_limit_is_passed_over() -> None:
    kernel = cs.compile(LAYER, threads=1, cache=False, memory_limit=0)
    assert (kernel.algorithm, kernel.workspace_bytes) == ("direct", 0)


@pytest.mark.parametrize("options", [{"algorithm": "winograd"}, {"algorithm": "im2col"},
                                     {"schedule": "stage x at e window n h w c"}])
def test_what_is_asked_for_beyond_the_limit_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LoweringError, match=r"memory_limit=100: .* needs a workspace of \d+ bytes for conv2d .* in "
                                            "nchw on 1 thread; give at least that, or None"):
        cs.compile(LAYER, threads=1, cache=False, memory_limit=100, **options)


def test_explain_tells_error_and_workspace() -> None:
    kernel = cs.compile(LAYER, algorithm="winograd", threads=1, cache=False)
    lines = dict(line.split(maxsplit=1) for line in kernel.explain().splitlines()[:7])
    assert f"workspace {kernel.workspace_bytes / 1024:.0f} KiB" in lines["algorithm"]
    assert lines["error"].startswith(f"{kernel.predicted_error.expected:.1e} of the output's rms expected")
    assert lines["error"].endswith("accuracy normal allows 5e-05")
