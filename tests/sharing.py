"""Which tests stay together where several processes share them out."""

from typing import final

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

__all__ = ["Sharing"]

# There is one Slurm on a machine, whose jobs wait more than they compute, and cores for one set of ranks that do.
_ONE_BY_ONE = ("tests/slurm/", "tests/distributed/")
# Short ones, whose fixtures of a module are made once.
_BY_FILE = ("tests/unit/", "tests/configs/")


@final
class Sharing(LoadScopeScheduling):
    """What needs many ranks stays together by folder, and the tests of a file of unit tests; others go one by one."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        alone = next((folder for folder in _ONE_BY_ONE if nodeid.startswith(folder)), None)
        if alone is not None:
            return alone
        return nodeid.partition("::")[0] if nodeid.startswith(_BY_FILE) else nodeid
