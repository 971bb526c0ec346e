"""Imported by the server that tests fork from: composes a config once, so that Hydra's parser is warm in every child."""

from tests.support import compose_config

__all__: list[str] = []

compose_config(["data=text", "data.files=[a]", "run.name=warm", "hooks=none"])
