"""Which tests stay together where several processes share them out."""

from typing import final

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

__all__ = ["Sharing"]

# There is one Slurm on a machine.
_TOGETHER = "tests/slurm/"
# Short ones, whose fixtures of a module are made once.
_BY_FILE = ("tests/unit/", "tests/configs/")


@final
class Sharing(LoadScopeScheduling):
    """Slurm's tests stay together, those of a file of unit tests too; the others go one by one, in their order."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(_TOGETHER):
            return _TOGETHER
        return nodeid.partition("::")[0] if nodeid.startswith(_BY_FILE) else nodeid
