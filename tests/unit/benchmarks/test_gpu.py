"""The script for one GPU runs to its end without one, and loses nothing that a part has found."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import PARTS, Part, run_part
from benchmarks.gpu_profile import CLASSES, class_of, shares
from benchmarks.gpu_runs import Job, Report
from benchmarks.gpu_table import BEGIN, END, put_into, table
from benchmarks.gpu_wheels import LARGEST_MIB, MADE_HERE, WHEELS, check
from regrow.trainer.config import PrecisionName
from tests.support import REPO

pytestmark = pytest.mark.slow

# Parts whose precision this version may lack; then they say so.
NEEDED = {"8b_bf16_params": "bf16_params", "8b_fp8": "fp8"}

# Makes packages look as if they were not installed.
HIDING = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    names = set({})

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.names else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def closure(*distributions: str) -> set[str]:
    """The distributions with all that they need, by their canonical names."""
    found: set[str] = set()
    waiting = [canonical(d) for d in distributions]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):
            needed = [r for r in metadata.requires(name) or [] if "extra ==" not in r]
            waiting += [canonical(re.split(r"[^\w.-]", r, maxsplit=1)[0]) for r in needed]
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def hidden() -> set[str]:
    """What can be imported here, but is neither torch's nor `transformers`' nor among the wheels."""
    there = closure("torch", "transformers") | {
        canonical(w) for w in (*WHEELS, *MADE_HERE, "numpy", "setuptools", "pip")
    }
    return {
        module
        for module, distributions in metadata.packages_distributions().items()
        if module != "regrow" and not {canonical(d) for d in distributions} & there
    }


def test_what_is_not_taken_along_is_hidden() -> None:
    assert {"wandb", "pyarrow", "matplotlib", "joblib", "hypothesis"} <= hidden()
    assert not {"torch", "numpy", "hydra", "zstandard", "torchao", "transformers"} & hidden()


def test_a_folder_of_wheels_is_looked_at(tmp_path: Path) -> None:
    assert "hydra-core is missing" in check(tmp_path)
    (tmp_path / "msgspec-0.0.1-cp312-none-any.whl").touch()
    (tmp_path / "torchao-99.whl").write_bytes(bytes(LARGEST_MIB << 20))
    (tmp_path / "more-1.whl").write_bytes(bytes(1 << 20))
    problems = check(tmp_path)
    assert any(p.startswith("msgspec must be ") for p in problems)
    assert f"the wheels must be at most {LARGEST_MIB} MiB, but are {LARGEST_MIB + 1:.1f}" in problems


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_part_reports_without_a_gpu(tmp_path: Path) -> None:
    """As on a GPU, with tiny sizes and what `make gpu` takes along: no part is skipped silently, and none fails."""
    out, page = tmp_path / "gpu.json", tmp_path / "page.md"
    (tmp_path / "sitecustomize.py").write_text(HIDING.format(sorted(hidden())))
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--budget", "900", "--json", str(out)]
    done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True, check=False)
    results: dict[str, dict[str, Any]] = json.loads(out.read_text())
    assert list(results) == list(PARTS)
    known = {p.name for p in PrecisionName}
    lacking = {part for part, precision in NEEDED.items() if precision not in known}
    assert {n: r["failed"] for n, r in results.items() if "failed" in r and n not in lacking} == {}
    assert [n for n, r in results.items() if "not_run" in r] == []
    assert done.returncode == int(bool(lacking)), done.stdout + done.stderr
    for name, result in results.items():
        assert set(result) - {"part_s"}, name
        # What it found, or why it found nothing, is in its line of the table.
        assert name in done.stdout
    assert results["1b"]["save"]["copies"] == "none: there is no GPU"
    assert len(results["1b"]["save"]["calls_ms"]) == 3
    assert "state" in results["1b"]["restart"]["start"]
    assert sum(results["1b"]["profile"]["shares"].values()) == pytest.approx(1.0, abs=1e-3)
    assert "skipped" in results["tests"]["summary"]
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put_into(page, results)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert table(results) in text


def finds(job: Job, report: Report) -> None:
    print("printed")
    report(first=1)
    report(second=job.tiny)


def fails(job: Job, report: Report) -> None:
    report(first=1)
    raise RuntimeError("no kernel")


def hangs(job: Job, report: Report) -> None:
    report(first=1)
    subprocess.Popen(["sleep", "600"])
    time.sleep(600)


def dies(job: Job, report: Report) -> None:
    report(first=1)
    os.kill(os.getpid(), signal.SIGKILL)


def run(part: Part, folder: Path, seconds: float = 60.0) -> dict[str, Any]:
    found = run_part(part, Job(tiny=True, folder=folder), time.monotonic() + seconds, folder / "log")
    found.pop("part_s", None)
    return found


def test_what_a_part_has_found_is_kept_however_it_ends(tmp_path: Path) -> None:
    assert run(Part(run=finds, bound_s=60), tmp_path) == {"first": 1, "second": True}
    assert (tmp_path / "log").read_text() == "printed\n"
    failed = run(Part(run=fails, bound_s=60), tmp_path)
    assert (failed["first"], failed["failed"]) == (1, "RuntimeError: no kernel")
    assert "in fails" in failed["log"]
    died = run(Part(run=dies, bound_s=60), tmp_path)
    assert (died["first"], died["failed"]) == (1, "its process died")


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    late = run(Part(run=hangs, bound_s=4), tmp_path)
    assert (late["first"], late["failed"]) == (1, "not done after 20 s")
    assert run(Part(run=finds, bound_s=60), tmp_path, seconds=1.0) == {"not_run": "the budget is used up"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoH (Device -> Pinned)", "copy"),
        ("triton_poi_fused_mul_silu_3", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("aten::mm", "matmul"),
        ("aten::copy_", "copy"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert class_of(name) == kind


def test_shares_add_up() -> None:
    found = shares([("aten::mm", 3.0), ("triton_x", 1.0)])
    assert (found["matmul"], found["elementwise"], found["other"]) == (0.75, 0.25, 0.0)
    assert set(found) == {*CLASSES, "other"}
    assert set(shares([]).values()) == {0.0}


def test_the_table_says_what_failed_and_what_was_not_run(tmp_path: Path) -> None:
    results: dict[str, dict[str, Any]] = {
        "limits": {"failed": "RuntimeError: no driver"},
        "1b": {"tokens_per_s": 60000, "mfu_6n": 0.45, "mfu_6n_12ldt": 0.5, "memory_gib": 40.0, "first_step_s": 13.0, "failed": "late | or\nso"},
        "8b_fp8": {"not_run": "the budget is used up"},
        "1b_recomputed": {"full": {"tokens_per_s": 1, "first_step_s": 2.0}, "failed": "not done after 9 s"},
    }  # fmt: skip
    text = table(results)
    assert "| 1b (failed: late / or so) | 60,000 | 45.0% | 50.0% | 40.0 GiB | 13.0 s |" in text
    assert "| 8b_fp8 | not run: the budget is used up |" in text
    assert "| 1b_recomputed, full | 1 |" in text
    assert "| 1b_recomputed | failed: not done after 9 s |" in text
    assert "Limits: failed: RuntimeError: no driver." in text
    assert "`tests/gpu`: no result." in text
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match="must hold the lines"):
        put_into(tmp_path / "page.md", results)
