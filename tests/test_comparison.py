"""The comparison with other libraries, without timing: its sets of layers, its sums and ratios, its options."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import compare
import layer_sets
import results

from convsched.autotune.measure.measure import Timing
from convsched.errors import ModelError
from convsched.networks.known import network
from convsched.problem import Conv2d

SMALL, LARGE = (Conv2d(8, 8, 1, input_size=size, activation="relu") for size in (4, 8))


def result(layer: Conv2d, **seconds: float) -> Any:
    """A layer that took so many seconds; 100 FLOP/s are the peak."""
    timings = {name.replace("_", " "): Timing((taken,), 1) for name, taken in seconds.items()}
    return results.Result(layer, timings, {}, {}, (), {}, 100.0)


def settings(*algorithms: str, libraries: tuple[str, ...] = ("PyTorch", "ncnn")) -> Any:
    return results.Settings(algorithms or ("auto",), libraries, 1, 3, 1e-3, "nchw")


# Sets

@pytest.mark.parametrize(("name", "texts"), [
    ("gemm", ["c=512 m=512 k=1x1 in=16x32", "c=1024 m=1024 k=1x1 in=32x32", "c=2048 m=2048 k=1x1 in=32x64"]),
    ("large", ["c=32 m=32 k=1x256 in=1x4096", "c=32 m=32 k=1x1024 in=1x4096",
               "c=32 m=32 k=31x31 in=112x112 pad=15,15,15,15"]),
    ("blocked", ["c=64 m=64 k=3x3 in=56x56 pad=1,1,1,1", "c=256 m=256 k=3x3 in=14x14 pad=1,1,1,1",
                 "c=512 m=512 k=1x1 in=14x14", "c=256 m=256 k=1x1 in=28x28"]),
])  # fmt: skip
def test_sets_of_written_layers(name: str, texts: list[str]) -> None:
    found = layer_sets.layer_set(name)
    assert [layer.text for layer in found.layers] == [f"conv2d {text} bias act=relu" for text in texts]
    assert found.counts == {}


def test_5x5_are_those_of_googlenet_and_the_grouped_one_of_alexnet() -> None:
    layers = layer_sets.layer_set("5x5").layers
    assert all(layer.kernel_size == (5, 5) and layer.stride == (1, 1) for layer in layers)
    assert [(layer.C, layer.M, layer.input_size) for layer in layers if layer.groups == 2] == [(96, 256, (27, 27))]
    assert (16, 32, (27, 27), 1) in [(layer.C, layer.M, layer.input_size, layer.groups) for layer in layers]
    assert len(set(layers)) == len(layers)


def test_1x7_lie_both_ways() -> None:
    layers = layer_sets.layer_set("1x7").layers
    assert {layer.kernel_size for layer in layers} == {(1, 7), (7, 1)}
    wide = [(layer.C, layer.M) for layer in layers if layer.kernel_size == (1, 7)]
    assert sorted(wide) == [(128, 128), (128, 192), (160, 160), (160, 192), (192, 192)]


@pytest.mark.parametrize("name", ["vgg16", "resnet50", "alexnet", "inception_v3"])
def test_a_set_of_a_network_has_all_its_convolutions(name: str) -> None:
    found, net = layer_sets.layer_set(f"conv:{name}"), network(name)
    assert found == layer_sets.layer_set(name)
    assert sum(count * layer.macs for layer, count in found.counts[name].items()) == net.macs
    assert sum(found.counts[name].values()) == sum(layer.count for layer in net.convolutions)
    assert set(found.layers) == set(found.counts[name])


def test_layers_that_differ_in_the_residual_only_are_one() -> None:
    found = layer_sets.layer_set("resnet18")
    layer = Conv2d(64, 64, 3, padding=1, input_size=56, activation="relu")
    assert found.counts["resnet18"][layer] == 4  # two of them end a block
    assert found.layers.count(layer) == 1


def test_a_set_of_several_networks_counts_in_each() -> None:
    found = layer_sets.layer_set("dense:resnet50,vgg16")
    assert list(found.counts) == ["resnet50", "vgg16"]
    assert set(found.layers) == {layer for own in found.counts.values() for layer in own}
    assert all(layer.kernel_size in ((1, 1), (3, 3)) and layer.stride == (1, 1) for layer in found.layers)
    assert list(layer_sets.layer_set("dense").counts) == ["resnet50", "vgg16", "mobilenet_v1"]


def test_a_filter_leaves_out_layers_and_networks() -> None:
    found = layer_sets.layer_set("vgg16,squeezenet").having("k=7x7")
    assert [layer.kernel_size for layer in found.layers] == [(7, 7)]
    assert list(found.counts) == ["squeezenet"]


def test_unknown_networks_are_refused() -> None:
    with pytest.raises(ModelError, match="network 'vgg1' is not known"):
        layer_sets.layer_set("conv:vgg1")
    with pytest.raises(click.UsageError, match=r"not known; use one of lenet5.*, or dense, conv, blocked, 5x5"):
        compare.set_of("6x6", "")
    with pytest.raises(click.UsageError, match="no layer of vgg16 has 'k=5x5'"):
        compare.set_of("vgg16", "k=5x5")


# Totals

def test_totals_weigh_layers_by_how_often_they_occur() -> None:
    found = [result(SMALL, convsched=1.0, PyTorch=3.0, ncnn=1.0), result(LARGE, convsched=2.0, PyTorch=2.0, ncnn=5.0)]
    total, = results.totals(found, {"net": {SMALL: 3, LARGE: 1}}, ("PyTorch", "ncnn"))
    assert total.seconds == {"convsched": 5.0, "PyTorch": 11.0, "ncnn": 8.0}
    assert (total.layers, total.ratio, total.notes) == (4, 1.6, ())  # the best single library, not the best a layer


def test_a_library_that_did_not_run_a_layer_has_no_total() -> None:
    found = [result(SMALL, convsched=1.0, PyTorch=3.0), result(LARGE, convsched=2.0, PyTorch=2.0, ncnn=0.1)]
    total, = results.totals(found, {"net": {SMALL: 1, LARGE: 1}}, ("PyTorch", "ncnn"))
    assert total.seconds == {"convsched": 3.0, "PyTorch": 5.0}
    assert total.notes == ("net: no total of ncnn, which did not run 1 of 2 layers",)
    assert total.ratio == pytest.approx(5 / 3)


def test_no_ratio_without_our_total() -> None:
    total, = results.totals([result(SMALL, PyTorch=3.0)], {"net": {SMALL: 2}}, ("PyTorch",))
    assert total.seconds == {"PyTorch": 6.0}
    assert total.ratio != total.ratio


def test_a_network_that_was_not_finished_has_no_total() -> None:
    assert results.totals([result(SMALL, convsched=1.0)], {"net": {SMALL: 1, LARGE: 1}}, ()) == []


# Tables

def test_best_of_all_includes_ncnn() -> None:
    one = result(SMALL, convsched=2.0, PyTorch=4.0, ncnn=1.0)
    means = results.summary([one], settings())
    assert (means["over the best"], means["over the best of all"], means["over ncnn"]) == (2.0, 0.5, 0.5)


def test_several_algorithms_have_columns_of_their_own() -> None:
    chosen = settings("auto", "direct", "winograd")
    assert chosen.ours == {"convsched": "auto", "ours direct": "direct", "ours winograd": "winograd"}
    one = result(SMALL, convsched=2.0, ours_direct=3.0, PyTorch=4.0)
    means = results.summary([one], chosen)
    assert means["over ours direct"] == pytest.approx(1.5)
    assert means["over ours winograd"] != means["over ours winograd"]
    text = printed(results.table([one], chosen))
    assert "ours winograd" in text
    assert "ours/direct" in text
    assert "ours/direct" not in printed(results.table([one], settings("direct")))


def test_what_does_not_apply_has_not_failed() -> None:
    timings = {"convsched": Timing((1.0,), 1)}
    one = results.Result(SMALL, timings, {}, {}, ("a note",), {"ours winograd": "one tap"}, 100.0)
    assert not one.failed(["convsched", "ours winograd"])
    assert one.failed(["convsched", "ours direct"])
    assert results.line(one).splitlines()[1:] == ["  a note", "  ours winograd: one tap"]


def test_all_is_told_in_json() -> None:
    found, chosen = [result(SMALL, convsched=1.0, PyTorch=3.0)], settings("auto", "direct")
    totals = results.totals(found, {"net": {SMALL: 2}}, chosen.libraries)
    told = json.loads(json.dumps(results.to_json(found, totals, chosen, {"PyTorch": "2"}), allow_nan=False))
    assert told["totals"] == [{"network": "net", "layers": 2, "seconds": {"convsched": 2.0, "PyTorch": 6.0},
                               "notes": ["net: no total of ncnn, which did not run 1 of 1 layers"], "ratio": 3.0}]
    assert told["geometric_means"]["over ours direct"] is None
    assert told["algorithms"] == ["auto", "direct"]
    assert "2000.000" in printed(results.totals_table(totals, chosen.libraries))


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# Algorithms

def test_commas_within_brackets_separate_nothing() -> None:
    assert compare.algorithms_of("direct,winograd(2,3)x(4,3),auto,direct") == ("direct", "winograd(2,3)x(4,3)", "auto")


@pytest.mark.parametrize("text", ["auto,wino", "", "direct,", "winograd(4"])
def test_misspelt_algorithms_are_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match=r"use one of direct, .*; or auto"):
        compare.algorithms_of(text)


def test_reasons_why_an_algorithm_does_not_apply() -> None:
    assert compare.why_not("auto", SMALL) == compare.why_not("direct", SMALL) == ""
    assert "has one tap" in compare.why_not("winograd", SMALL)
    assert "the class allows 5e-05" in compare.why_not("winograd(6,3)", Conv2d(512, 16, 3, input_size=14))
