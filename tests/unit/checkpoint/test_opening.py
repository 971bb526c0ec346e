"""URLs that no storage can be opened with."""

import pytest

from regrow.checkpoint.storage.opening import open_storage
from regrow.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "options"),
    [("s3://[x", {}), ("s3://bucket/x", {"region": 3}), ("nowhere://x", {}), ("hdfs3://x", {})],
)
def test_a_url_that_cannot_be_used_is_one_sentence(url: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.folder must (be|have) .*but is '"):
        open_storage(url, options)
