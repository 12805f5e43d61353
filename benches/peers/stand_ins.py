"""Stand-ins for torch, triton and safetensors in the tests of clocks, graphs and the search."""

import sys
import types


class Dtype:
    def __init__(self, itemsize):
        self.itemsize = itemsize


class Ids(list):
    """A tensor of integers."""

    def __mod__(self, divisor):
        return Ids(each % divisor for each in self)

    def unique(self):
        return Ids(set(self))

    def numel(self):
        return len(self)


def missing(*all, **more):
    raise AssertionError("the stand-in for torch has no such function")


def torch():
    """The names that modules read at import, and the functions that tests patch."""
    functions = "Event CUDAGraph graph Stream current_stream stream synchronize".split()
    dtypes = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4, "float64": 8}
    module = types.ModuleType("torch")
    module.cuda = types.SimpleNamespace(**dict.fromkeys(functions, missing))
    module.Tensor = module.device = module.dtype = object
    module.empty = missing
    module.arange = lambda count: Ids(range(count))
    for name, itemsize in dtypes.items():
        setattr(module, name, Dtype(itemsize))
    return module


def triton():
    module = types.ModuleType("triton")
    module.__version__ = "stand-in"
    module.errors = types.ModuleType("triton.errors")
    module.errors.TritonError = type("TritonError", (Exception,), {})
    return module


def install():
    """Replaces all of the packages in `sys.modules`, so that tests that need the real ones fail."""
    triton_ = triton()
    safetensors = types.ModuleType("safetensors")
    safetensors.safe_open = missing
    modules = {"torch": torch(), "triton": triton_, "triton.errors": triton_.errors}
    sys.modules.update(modules | {"safetensors": safetensors})
