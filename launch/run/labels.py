"""What each of a run's manifests says of the run."""

from typing import Any

from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.versions import software_versions

__all__ = ["run_labels"]


def run_labels(spec: RankSpec, fingerprint: str) -> dict[str, Any]:
    """What each of a run's manifests says of the run.

    Args:
        spec: of the run.
        fingerprint: of its data.
    """
    assert spec.record is not None, "the launcher opens the run before any rank starts"
    # Options for a storage may be credentials.
    checkpoint = {k: v for k, v in spec.config_dict["checkpoint"].items() if k != "storage_options"}
    return {
        "data_fingerprint": fingerprint,
        "config_hash": spec.config_hash,
        "model": spec.config_dict["model"],
        "versions": software_versions(),
        "run_id": spec.record.run_id,
        "config": {**spec.config_dict, "checkpoint": checkpoint},
        "lineages": tuple(spec.record.lineages),
    }
