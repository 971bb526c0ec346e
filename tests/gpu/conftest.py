"""What tests and ranks from the pool need on a GPU."""

import os
import warnings

import pytest
import torch

# The pool's server loads Inductor, which must not start its compiler processes there: ranks would share their pipes.
os.environ.setdefault("TORCH_WARM_POOL", "0")
# Inductor asks for a GPU where it is loaded, after which no fork of that process can use one.
os.environ.setdefault("TORCHINDUCTOR_USE_EXPERIMENTAL_BENCHMARKER", "0")


@pytest.fixture(scope="session", autouse=True)
def sync_debug_mode_has_warned() -> None:
    """It says once a process that it is a prototype, and a warning is an error here."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("default")
