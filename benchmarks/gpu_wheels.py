"""The packages that `benchmarks.gpu` needs where there is torch and no network, as a folder of wheels.

    python -m benchmarks.gpu_wheels .gpu-wheels

For CPython 3.12 on x86-64, at the versions of constraints.txt. torch comes with filelock, fsspec, jinja2, networkx,
sympy and typing-extensions; numpy lies beside it wherever models are trained.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["LARGEST_MIB", "MADE_HERE", "WHEELS", "check", "main"]

REPO = Path(__file__).resolve().parent.parent
LARGEST_MIB = 20
WHEELS = ("hydra-core", "omegaconf", "PyYAML", "packaging", "msgspec", "psutil", "rich", "Pygments", "markdown-it-py",
          "mdurl", "tokenizers", "xxhash", "zstandard", "pytest", "pytest-timeout", "pytest-xdist", "execnet",
          "iniconfig", "pluggy", "torchao")  # fmt: skip
# It has no wheel of its own; made of its sources it runs everywhere.
MADE_HERE = ("antlr4-python3-runtime",)
_ABIS = ("cp312", "abi3", "none")
_PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "any",
)
_TARGET = ["--only-binary=:all:", "--implementation", "cp", "--python-version", "3.12",
           *(a for abi in _ABIS for a in ("--abi", abi)),
           *(a for platform in _PLATFORMS for a in ("--platform", platform))]  # fmt: skip


def main() -> int:
    """Fills the folder; 0 when everything is there and small enough."""
    folder = Path(sys.argv[1])
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip"]
    common = ["--quiet", "--no-deps", "--constraint", str(REPO / "constraints.txt")]
    subprocess.run([*pip, "download", *common, *_TARGET, "--dest", str(folder), *WHEELS], check=True)
    subprocess.run(
        [*pip, "wheel", *common, "--no-build-isolation", "--wheel-dir", str(folder), *MADE_HERE], check=True
    )
    problems = check(folder)
    print("\n".join(problems) or f"{folder}: {len(list(folder.iterdir()))} wheels, {_mib(folder):.1f} MiB")
    return int(bool(problems))


def check(folder: Path) -> list[str]:
    """What is wrong with a folder of wheels: one is missing or of another version, or they are too large."""
    versions = {
        _name(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)", (REPO / "constraints.txt").read_text(), re.M)
    }
    found = {_name(w.name.split("-")[0]): w.name.split("-")[1] for w in folder.glob("*.whl")}
    problems = [f"{name} is missing" for name in (*WHEELS, *MADE_HERE) if _name(name) not in found]
    problems += [
        f"{name} must be {versions[name]}, but is {version}"
        for name, version in sorted(found.items())
        if name in versions and versions[name] != version
    ]
    if _mib(folder) > LARGEST_MIB:
        problems.append(f"the wheels must be at most {LARGEST_MIB} MiB, but are {_mib(folder):.1f}")
    return problems


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _mib(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.iterdir()) / 2**20


if __name__ == "__main__":
    sys.exit(main())
