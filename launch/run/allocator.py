"""How torch's allocator for GPUs is told to work, before torch reads it. Standard library only."""

from collections.abc import MutableMapping

__all__ = ["use_expandable_segments"]

# The name of newer releases, and the one that all of them read.
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def use_expandable_segments(environ: MutableMapping[str, str]) -> None:
    """Has memory grow in place, so that what steps of several shapes leave behind does not add up in fragments.

    Left alone where the user has said how the allocator is to work.

    Args:
        environ: the process' variables, before torch first asks a GPU for memory.
    """
    if not any(name in environ for name in _VARIABLES):
        environ.update(dict.fromkeys(_VARIABLES, "expandable_segments:True"))
