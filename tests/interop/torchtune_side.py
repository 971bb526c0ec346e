"""Run by torchtune's own Python: loads a Meta-format file as its recipes do, and writes the logits.

`python torchtune_side.py FOLDER FILE DIMS.json TOKENS.pt OUT.pt`
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torchtune.models.llama3 import llama3  # type: ignore[import-not-found,unused-ignore]
from torchtune.training import FullModelMetaCheckpointer  # type: ignore[import-not-found,unused-ignore]


def main() -> None:
    """See above."""
    folder, file, dims, tokens, out = sys.argv[1:]
    checkpointer = FullModelMetaCheckpointer(
        checkpoint_dir=folder, checkpoint_files=[file], model_type="LLAMA3", output_dir=str(Path(out).parent / "tune")
    )
    state: dict[str, Any] = checkpointer.load_checkpoint()["model"]
    model = llama3(**json.loads(Path(dims).read_text()))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    # Tables that it computes itself.
    assert all("rope" in name for name in missing), missing
    model.eval()
    with torch.no_grad():
        logits = model(torch.load(tokens))
    torch.save({"logits": logits, "dtypes": sorted({str(t.dtype) for t in state.values()})}, out)


if __name__ == "__main__":
    main()
