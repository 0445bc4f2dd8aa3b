"""What layers are run on: arrays, layouts, images, and the error they are judged by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convsched.benchmark.cases import Case, fit_image, make_arrays, read_image, relative_error, table_case
from convsched.errors import ModelError
from convsched.problem import Conv2d
from convsched.problem.layout import LAYOUTS, from_layout, to_layout

SMALL = Conv2d(3, 20, 3, padding=1, input_size=(5, 6), activation="relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 16, 20])
def test_layouts_round_trip(layout: str, channels: int) -> None:
    array = np.arange(2 * channels * 3 * 5, dtype=np.float32).reshape(2, channels, 3, 5)
    there = to_layout(array, layout)
    np.testing.assert_array_equal(from_layout(there, array.shape, layout), array)
    shapes: dict[str, tuple[int, ...]] = {"nchw": (2, channels, 3, 5), "nhwc": (2, 3, 5, channels)}
    shapes["nchw16c"] = (2, -(-channels // 16), 3, 5, 16)
    assert there.shape == shapes[layout]
    assert there.sum() == array.sum()  # the tail is zero


def test_arrays_are_the_same_for_the_same_seed() -> None:
    case = Case("a", Conv2d(8, 4, 3, input_size=5, residual=True))
    one, two = make_arrays(case), make_arrays(case)
    np.testing.assert_array_equal(one.x, two.x)
    np.testing.assert_array_equal(one.weight, two.weight)
    assert one.residual is not None
    assert one.x.min() == 0  # as after a ReLU
    assert make_arrays(table_case("a", SMALL, 1)).x.min() < 0  # as an image is


def test_relative_error() -> None:
    expected = np.array([3.0, -4.0])
    assert relative_error(np.array([3, -4], np.float32), expected) == 0
    assert relative_error(np.array([3, -3.5], np.float32), expected) == pytest.approx(0.5 / math.sqrt(12.5))
    assert relative_error(np.array([np.nan, 0], np.float32), expected) == math.inf
    assert relative_error(np.array([np.inf, 0], np.float32), expected) == math.inf
    assert relative_error(np.array([0.5], np.float32), np.zeros(1)) == 0.5


@pytest.mark.parametrize("shape", [(9, 7, 3), (3, 9, 7), (1, 9, 7, 3), (9, 7, 4)])
def test_images_as_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "image.npy", np.ones(shape))
    image = read_image(tmp_path / "image.npy")
    assert (image.shape, image.dtype) == ((9, 7, 3), np.float32)


def test_an_image_is_cut_around_its_middle() -> None:
    image = np.repeat(np.arange(8 * 12, dtype=np.float32).reshape(8, 12, 1), 3, axis=2)
    same = fit_image(image, Conv2d(3, 1, 1, input_size=(8, 12)))
    np.testing.assert_array_equal(same, image.transpose(2, 0, 1))
    square = fit_image(image, Conv2d(3, 1, 1, input_size=8))
    np.testing.assert_array_equal(square, image[:, 2:10].transpose(2, 0, 1))
    grey = fit_image(image, Conv2d(1, 1, 1, input_size=(4, 6)))
    assert grey.shape == (1, 4, 6)


def test_an_image_file_is_scaled(tmp_path: Path) -> None:
    io_module: Any = pytest.importorskip("skimage.io")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    io_module.imsave(tmp_path / "image.png", pixels, check_contrast=False)
    image = read_image(tmp_path / "image.png")
    assert image.shape == (16, 16, 3)
    assert abs(image.mean()) < 1e-3
    assert image.std() == pytest.approx(1, abs=1e-3)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    np.save(tmp_path / "vector.npy", np.ones(5))
    with pytest.raises(ModelError, match=r"an array of shape \(5,\) is not an image"):
        read_image(tmp_path / "vector.npy")
    (tmp_path / "broken.npy").write_bytes(b"not an array")
    with pytest.raises(ModelError, match="cannot be read as an array"):
        read_image(tmp_path / "broken.npy")
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000, 100000000), }".ljust(117) + b"\n"
    (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + header)
    with pytest.raises(ModelError, match=r"huge\.npy: cannot be read as an array: Unable to allocate"):
        read_image(tmp_path / "huge.npy")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ModelError, match="cannot be read as an image"):
        read_image(tmp_path / "broken.png")
