"""Everything that touches checkpoint bytes and decides when, what and which.

Knows nothing of models or the trainer: it is given named tensors and gives them back. Loops other than Regrow's own
use `Checkpointer` (docs/other-trainers.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.checkpoint.checkpointer import Checkpointer
    from regrow.checkpoint.checkpointer_options import CheckpointerOptions
    from regrow.checkpoint.nested_state import join_state, split_state

__all__ = ["Checkpointer", "CheckpointerOptions", "join_state", "split_state"]

_MODULES = {
    "Checkpointer": "checkpointer",
    "CheckpointerOptions": "checkpointer_options",
    "join_state": "nested_state",
    "split_state": "nested_state",
}


def __getattr__(name: str) -> Any:
    # The modules of config lie below this package, and must not load torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
