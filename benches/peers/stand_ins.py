"""What the tests of clocks, graphs and the search ask of torch, triton and safetensors, for machines without them."""

import sys
import types


class Dtype:
    def __init__(self, itemsize):
        self.itemsize = itemsize


class Ids(list):
    """Whole numbers in a row."""

    def __mod__(self, divisor):
        return Ids(each % divisor for each in self)

    def unique(self):
        return Ids(set(self))

    def numel(self):
        return len(self)


def absent(*all, **more):
    raise AssertionError("a test without torch asks for something of it that is not played")


def torch():
    """Names that modules read when they are imported, and functions that tests put others in the place of."""
    functions = "Event CUDAGraph graph Stream current_stream stream synchronize".split()
    dtypes = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4, "float64": 8}
    module = types.ModuleType("torch")
    module.cuda = types.SimpleNamespace(**dict.fromkeys(functions, absent))
    module.Tensor = module.device = module.dtype = object
    module.empty = absent
    module.arange = lambda count: Ids(range(count))
    for name, itemsize in dtypes.items():
        setattr(module, name, Dtype(itemsize))
    return module


def triton():
    module = types.ModuleType("triton")
    module.__version__ = "played"
    module.errors = types.ModuleType("triton.errors")
    module.errors.TritonError = type("TritonError", (Exception,), {})
    return module


def install():
    """Puts them in the place of what is not installed, all or none: tests that need more fail."""
    played = triton()
    safetensors = types.ModuleType("safetensors")
    safetensors.safe_open = absent
    modules = {"torch": torch(), "triton": played, "triton.errors": played.errors}
    sys.modules.update(modules | {"safetensors": safetensors})
