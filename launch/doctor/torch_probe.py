"""Says as JSON what torch is, sees and needs here: `python -m regrow.launch.doctor.torch_probe OVERRIDE…`."""

import importlib.util
import json
import sys
from typing import Any

import torch

from regrow.launch.config.composition import compose_config
from regrow.launch.config.schema import register_schemas
from regrow.launch.config.typed import to_config
from regrow.launch.run.build import build_model
from regrow.torch_compat import can_compile
from regrow.trainer.precision import change_parameters

__all__ = ["main"]


def main() -> None:
    """Prints one line."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "devices": [],
        "triton": importlib.util.find_spec("triton") is not None,
        "compiles": can_compile(),
        "checkpoint_bytes": None,
        "problem": None,
    }
    if torch.cuda.is_available():
        found["devices"] = [_device(index) for index in range(torch.cuda.device_count())]
    try:
        found["checkpoint_bytes"] = _checkpoint_bytes(sys.argv[1:])
    except Exception as error:
        # The command itself says what is wrong with its overrides; a machine is looked at all the same.
        found["problem"] = f"{type(error).__name__}: {error}"
    print(json.dumps(found), flush=True)


def _device(index: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    # A product on the device shows whether this torch has code for it.
    ones = torch.ones(8, 8, device=f"cuda:{index}")
    works = bool(((ones @ ones) == 8).all().item())
    return {"name": properties.name, "free": free, "total": total, "works": works}


def _checkpoint_bytes(overrides: list[str]) -> int:
    """Of the weights and two moments of the same type."""
    register_schemas()
    config = to_config(compose_config(overrides))
    with torch.device("meta"):
        model = build_model(config)
    change_parameters(model, config.precision.name)
    return 3 * sum(p.numel() * p.itemsize for p in model.parameters())


if __name__ == "__main__":
    main()
