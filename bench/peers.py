"""Other libraries on one convolution layer with bias and ReLU, each as its own documentation has it fast.

Every peer gets the same float32 arrays, its weights as constants (so that it may pack them beforehand), its
input and output memory allocated beforehand where its interface allows that, and float32 arithmetic
throughout (no bfloat16, no float16). `prepare` returns a call that runs the layer once and a function that
gives the last output as an NCHW array.

A library that is not installed raises ImportError; one that cannot run a layer raises what it likes.
"""

from __future__ import annotations

import importlib
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from convsched.benchmark.cases import Arrays
from convsched.problem import Conv2d


@dataclass(frozen=True)
class Prepared:
    """A layer made ready in one library. The call is valid as long as this object lives: see `keep`."""

    call: Callable[[], object]
    output: Callable[[], np.ndarray]
    keep: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Peer:
    """A library: its short name in tables, its package, and how it is given a layer."""

    name: str
    package: str
    prepare: Callable[[Conv2d, Arrays, int], Prepared]

    @property
    def version(self) -> str:
        """Raises PackageNotFoundError (an ImportError) if it is not installed."""
        return metadata.version(self.package)


def onnx_model(problem: Conv2d, arrays: Arrays) -> bytes:
    """A model of one Conv and one Relu, weights as initializers."""
    onnx = importlib.import_module("onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    initializers = [onnx.numpy_helper.from_array(arrays.weight, "w")]
    if arrays.bias is not None:
        initializers.append(onnx.numpy_helper.from_array(arrays.bias, "b"))
    conv = helper.make_node(
        "Conv", ["x", *(tensor.name for tensor in initializers)], ["t" if problem.activation else "y"],
        kernel_shape=problem.kernel_size, strides=problem.stride, pads=problem.padding,
        dilations=problem.dilation, group=problem.groups,
    )  # fmt: skip
    relu = [helper.make_node("Relu", ["t"], ["y"])] if problem.activation else []
    graph = helper.make_graph(
        [conv, *relu],
        "layer",
        [helper.make_tensor_value_info("x", float32, problem.input_shape)],
        [helper.make_tensor_value_info("y", float32, problem.output_shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def onnxruntime(problem: Conv2d, arrays: Arrays, threads: int) -> Prepared:
    """One session with I/O binding. Its threads spin within a run only, so as not to slow the others."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = onnx_model(problem, arrays)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = ort.OrtValue.ortvalue_from_numpy(arrays.x)
    y = ort.OrtValue.ortvalue_from_numpy(np.full(problem.output_shape, np.nan, np.float32))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x)
    binding.bind_ortvalue_output("y", y)
    return Prepared(lambda: session.run_with_iobinding(binding), y.numpy, (session, binding, x, y))


def openvino(problem: Conv2d, arrays: Arrays, threads: int) -> Prepared:
    """One request in latency mode on shared tensors; not pinned, since the others run on the same cores."""
    ov = importlib.import_module("openvino")
    core = ov.Core()
    properties = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(core.read_model(onnx_model(problem, arrays)), "CPU", properties)
    request = compiled.create_infer_request()
    output = np.full(problem.output_shape, np.nan, np.float32)
    request.set_input_tensor(ov.Tensor(arrays.x, shared_memory=True))
    request.set_output_tensor(ov.Tensor(output, shared_memory=True))
    # Without share_outputs the output is copied; start_async and wait take 40 us more than infer.
    return Prepared(lambda: request.infer(share_outputs=True), lambda: output, (core, compiled, arrays.x))


def pytorch(problem: Conv2d, arrays: Arrays, threads: int) -> Prepared:
    """Eager, channels last, in inference mode: oneDNN on arrays that need no reordering."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    last = torch.channels_last
    x = torch.from_numpy(arrays.x).to(memory_format=last)
    weight = torch.from_numpy(arrays.weight).to(memory_format=last)
    bias = None if arrays.bias is None else torch.from_numpy(arrays.bias)
    top, left, bottom, right = problem.padding
    symmetric = (top, left) == (bottom, right)
    padding = (top, left) if symmetric else (0, 0)
    conv, pad = torch.nn.functional.conv2d, torch.nn.functional.pad
    result: list[Any] = []

    def call() -> None:
        with torch.inference_mode():
            source = x if symmetric else pad(x, (left, right, top, bottom))
            y = conv(source, weight, bias, problem.stride, padding, problem.dilation, problem.groups)
            result[:] = [torch.relu_(y) if problem.activation else y]

    return Prepared(call, lambda: np.asarray(result[0].numpy()))


def ncnn(problem: Conv2d, arrays: Arrays, threads: int) -> Prepared:
    """One layer with the activation fused; extraction gives an unpacked CHW array, like the input."""
    library = importlib.import_module("ncnn")
    if problem.N != 1:
        raise NotImplementedError("ncnn has no batch")
    net = library.Net()
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage",
                   "int8_packed", "int8_storage", "int8_arithmetic", "int8_inference",
                   "vulkan_compute"):  # fmt: skip
        if hasattr(net.opt, f"use_{option}"):
            setattr(net.opt, f"use_{option}", False)
    net.opt.num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "layer.bin"
        bias = b"" if arrays.bias is None else arrays.bias.tobytes()
        weights.write_bytes(struct.pack("<I", 0) + arrays.weight.tobytes() + bias)  # 0: plain float32
        if net.load_param_mem(_ncnn_param(problem)) != 0 or net.load_model(str(weights)) != 0:
            raise RuntimeError("ncnn did not load the layer")
    x = library.Mat(arrays.x[0]).clone()
    result: list[Any] = []

    def call() -> None:
        extractor = net.create_extractor()
        extractor.input("x", x)
        result[:] = [extractor.extract("y")[1], extractor]

    return Prepared(call, lambda: np.array(result[0])[np.newaxis], (net, x))


def _ncnn_param(problem: Conv2d) -> str:
    """The layer in ncnn's text form; the numbers are the parameter ids of its Convolution layer."""
    top, left, bottom, right = problem.padding
    parameters = {
        0: problem.M, 1: problem.S, 11: problem.R, 2: problem.dilation[1], 12: problem.dilation[0],
        3: problem.stride[1], 13: problem.stride[0], 4: left, 14: top, 15: right, 16: bottom,
        5: int(problem.bias), 6: problem.weights, 7: problem.groups, 9: int(problem.activation is not None),
    }  # fmt: skip
    if problem.groups == 1:
        del parameters[7]
    kind = "Convolution" if problem.groups == 1 else "ConvolutionDepthWise"
    words = " ".join(f"{key}={value}" for key, value in parameters.items())
    return f"7767517\n2 2\nInput input 0 1 x\n{kind} layer 1 1 x y {words}\n"


PEERS = (
    Peer("onnxruntime", "onnxruntime", onnxruntime),
    Peer("OpenVINO", "openvino", openvino),
    Peer("PyTorch", "torch", pytorch),
    Peer("ncnn", "ncnn", ncnn),
)
