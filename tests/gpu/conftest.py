"""What tests and ranks from the pool need on a GPU."""

import os
import warnings
from pathlib import Path

import pytest
import torch

# The pool's server loads Inductor, which must not start its compiler processes there: ranks would share their pipes.
os.environ.setdefault("TORCH_WARM_POOL", "0")
# Inductor asks for a GPU where it is loaded, after which no fork of that process can use one.
os.environ.setdefault("TORCHINDUCTOR_USE_EXPERIMENTAL_BENCHMARKER", "0")

# Raised by torch itself: while it loads its compiler, where that looks at tensors and at autograd functions, and where
# it chooses another kernel.
_OF_TORCH = [
    "ignore:`torch.jit.script_method` is deprecated",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:.* should not be instantiated. Methods on autograd functions are all static:DeprecationWarning",
    r"ignore:\s*Online softmax is disabled on the fly",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in _OF_TORCH:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session", autouse=True)
def sync_debug_mode_has_warned() -> None:
    """It says once a process that it is a prototype, and a warning is an error here."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("default")
