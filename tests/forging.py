"""Documents of a step changed as somebody would who knows the format: with right sizes, hashes and checksums."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from regrow.checkpoint.format.manifest import MANIFEST, checksum

# A sound step, as commit 5d27da2 wrote it.
SOUND = Path(__file__).parent / "compatibility/run_5d27da2/run/checkpoint/step-8"

Edit = Callable[[dict[str, Any]], object]


def sound_step(folder: Path, step: int = 8) -> Path:
    """A copy of a sound step."""
    shutil.copytree(SOUND, folder / f"step-{step}")
    return folder / f"step-{step}"


def forge(step: Path, root: Edit | None = None, rank: Edit | None = None) -> None:
    """Changes the root manifest and rank 0's, and makes hashes and checksum right again.

    Args:
        step: its folder.
        root: changes the root manifest's fields.
        rank: changes the rank manifest's.
    """
    manifest = json.loads((step / MANIFEST).read_text())
    manifest.pop("checksum")
    if rank is not None:
        document = json.loads((step / "rank-0.json").read_text())
        rank(document)
        body = json.dumps(document).encode()
        (step / "rank-0.json").write_bytes(body)
        manifest["files"]["rank-0.json"] = len(body)
        manifest["hashes"]["rank-0.json"] = xxhash.xxh3_128_hexdigest(body)
    if root is not None:
        root(manifest)
    (step / MANIFEST).write_text(json.dumps({"checksum": checksum(manifest), **manifest}))
