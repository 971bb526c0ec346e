"""Checkpoints behind a real S3 API: saving, resuming, retention, and a store that fails in the middle."""

import http.client
import mmap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.format.layout import make_plan
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.rank_manifest import rank_manifest, rank_manifest_name
from regrow.checkpoint.load.loading import load_tensors
from regrow.checkpoint.policy.lineage import Lineage
from regrow.checkpoint.policy.retention import KeepLatest
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.run.lease import LeaseHeldError, LeaseLostError, acquire_lease
from regrow.checkpoint.save.commit import Committer, complete_step
from regrow.checkpoint.save.coordinator import report_of
from regrow.checkpoint.save.saver import SaverOptions, StepSaver
from regrow.checkpoint.save.writer import file_name, write_tensors
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import open_storage
from tests.late_storage import LateListings
from tests.runs import train
from tests.s3_server import BreakingProxy, s3_server
from tests.support import curve, record, tiny
from tests.warm import regrow

pytestmark = pytest.mark.slow

LINE = [Lineage(id="a")]


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(server: int) -> Iterator[BreakingProxy]:
    proxy = BreakingProxy(server)
    yield proxy
    proxy.close()


def options(port: int) -> dict[str, str]:
    # Ranks of the pool have the environment of its beginning, so credentials go in here.
    return {
        "endpoint": f"http://127.0.0.1:{port}",
        "region": "us-east-1",
        "access_key_id": "key",
        "secret_access_key": "secret",
    }


@pytest.fixture(params=["s3", "memory", "local"])
def place(request: pytest.FixtureRequest, proxy: BreakingProxy, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return open_storage(f"s3://bucket/{tmp_path.name}", options(proxy.port))
    return open_storage(tmp_path / "c" if request.param == "local" else f"memory://{tmp_path}/c")


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = dist.new_group(backend="gloo")
    assert made is not None
    yield made
    dist.destroy_process_group()


def test_every_storage_keeps_the_same_promises(place: Storage) -> None:
    place.make()
    place.write("a", b"one")
    place.write("a", b"two")
    assert place.read("a") == b"two"
    assert place.create("b", b"first")
    assert not place.create("b", b"second")
    assert place.read("b") == b"first"
    child = place.child("step-1")
    child.make()
    data = bytes(range(256)) * 16 * 2600
    aligned = mmap.mmap(-1, len(data))
    aligned[:] = data
    child.stream("big", len(data), (memoryview(aligned)[s : s + (8 << 20)] for s in range(0, len(data), 8 << 20)))
    assert child.sizes() == {"big": len(data)}
    with child.open("big") as reader:
        memory = bytearray(1000)
        assert reader.read_into(5000, memoryview(memory)) == 1000
        assert bytes(memory) == data[5000:6000]
        assert reader.read_into(len(data) - 10, memoryview(memory)) == 10
    assert place.names() == ["a", "b", "step-1"]
    place.move("step-1", "set-aside/why/step-1")
    assert place.exists("set-aside/why/step-1/big")
    assert not place.exists("step-1")
    place.remove("set-aside")
    place.remove("not there")
    assert place.names() == ["a", "b"]
    with pytest.raises(FileNotFoundError):
        place.read("gone")
    assert place.child("nothing").names() == []
    assert place.child("nothing").sizes() == {}


@pytest.mark.parametrize("mode", list(AsyncMode), ids=lambda m: str(m.name))
def test_save_load_and_retention(place: Storage, group: dist.ProcessGroup, mode: AsyncMode) -> None:
    tensors = {"w": torch.randn(3000, 700), "b": torch.randn(7), "s": torch.tensor(3.0)}
    saver, catalog = StepSaver(place, mode, torch.device("cpu"), group), Catalog(place)
    for step in (1, 2, 3):
        tensors["w"] += 1
        assert [r.error for r in [*saver.save(tensors, Manifest(step=step, lineage="a")), *saver.wait()]] == [None]
    saver.close()
    assert catalog.prune([KeepLatest(2)], LINE) == [1]
    assert [e.step for e in catalog.entries(LINE)] == [2, 3]
    loaded = {n: torch.zeros_like(t) for n, t in tensors.items()}
    load_tensors(catalog.step_place(3), loaded, group)
    assert all(torch.equal(t, tensors[n]) for n, t in loaded.items())


@pytest.mark.parametrize("place", ["s3", "memory"], indirect=True)
def test_a_rank_that_wakes_up_late_replaces_nothing(place: Storage, group: dist.ProcessGroup) -> None:
    """Two attempts save step 1; the first one's rank is paused until the second has committed."""
    tensors = {"w": torch.randn(300, 70)}
    paused = Committer(place, "paused", None)
    saver = StepSaver(place, AsyncMode.disabled, torch.device("cpu"), group)
    assert [r.error for r in saver.save(tensors, Manifest(step=1, lineage="a"))] == [None]
    saver.close()
    late = paused.working_place(1)
    plan = make_plan({"w": torch.zeros(300, 70)}, 0, 1)
    names = [file_name(0, 0, paused.writer)]
    hashes = write_tensors(late, names, plan, {"w": torch.zeros(300, 70)})
    body = rank_manifest(plan, names, [hashes["w"]])
    late.write(rank_manifest_name(0, paused.writer), body)
    with pytest.raises(FileExistsError, match="complete already"):
        paused.commit(Manifest(step=1, lineage="a"), [report_of(body)])
    # Paused later still: when it had seen already that nobody had written the step.
    with pytest.raises(FileExistsError, match=r"another writer's .metadata"):
        complete_step(late, Manifest(step=1, lineage="a", writer=paused.writer), [report_of(body)])
    paused.discard(1)
    loaded = {"w": torch.zeros(300, 70)}
    (entry,) = Catalog(place).entries(LINE)
    load_tensors(entry, loaded, group)
    assert torch.equal(loaded["w"], tensors["w"])


def test_a_part_that_fails_now_and_then_is_sent_again(proxy: BreakingProxy, group: dist.ProcessGroup) -> None:
    place = open_storage("s3://bucket/again", options(proxy.port))
    tensors = {"w": torch.randn(6000, 1000)}
    saver = StepSaver(place, AsyncMode["async"], torch.device("cpu"), group)
    proxy.break_next(r"PUT .*distcp\?.*partNumber=2", 2)
    results = [*saver.save(tensors, Manifest(step=1, lineage="a")), *saver.wait()]
    assert [r.error for r in results] == [None]
    assert proxy.broken == 2
    saver.close()


def test_a_store_that_keeps_failing_costs_one_save(
    proxy: BreakingProxy, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload that fails in the middle is taken back; the step before stays; the next save works."""
    from datetime import timedelta

    monkeypatch.setattr(
        "regrow.checkpoint.storage.objects._RETRY", {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
    )
    place = open_storage("s3://bucket/failing", options(proxy.port))
    catalog = Catalog(place)
    tensors = {"w": torch.randn(6000, 1000)}
    saver = StepSaver(place, AsyncMode["async"], torch.device("cpu"), group)
    saver.save(tensors, Manifest(step=1, lineage="a"))
    assert [r.error for r in saver.wait()] == [None]
    proxy.break_next(r"PUT .*distcp\?.*partNumber=2", 1000)
    tensors["w"] += 1
    saver.save(tensors, Manifest(step=2, lineage="a"))
    (failed,) = saver.wait()
    assert failed.error is not None
    assert "__0_0-" in failed.error
    assert any(r.startswith("DELETE") and "uploadId" in r for r in proxy.seen), "the upload must be taken back"
    assert [e.step for e in catalog.entries(LINE)] == [1]
    assert catalog.candidates() == [1]
    proxy.break_next("nothing", 0)
    saver.save(tensors, Manifest(step=3, lineage="a"))
    assert [r.error for r in saver.wait()] == [None]
    assert [e.step for e in catalog.entries(LINE)] == [1, 3]
    saver.close()


def test_a_save_that_was_cut_short_is_no_step(proxy: BreakingProxy, group: dist.ProcessGroup) -> None:
    """Without renames the manifest makes the step, so files without it are what a killed writer left."""
    place = open_storage("s3://bucket/short", options(proxy.port))
    saver = StepSaver(place, AsyncMode["async"], torch.device("cpu"), group)
    for step in (1, 2):
        saver.save({"w": torch.randn(10)}, Manifest(step=step, lineage="a"))
        saver.wait()
    saver.close()
    place.child("step-2").remove("manifest.json")
    catalog = Catalog(place)
    assert [e.step for e in catalog.entries(LINE)] == [1]
    assert catalog.clean_up(LINE) == ["removed the incomplete step-2"]
    assert catalog.candidates() == [1]


def test_listings_that_are_late_stop_no_run(proxy: BreakingProxy, group: dist.ProcessGroup) -> None:
    """By less than the lease's timeout, as documented: beats and saves go on, and a second launcher is refused."""
    place = LateListings(open_storage("s3://bucket/late", options(proxy.port)), 1.2)
    lost = threading.Event()
    lease = acquire_lease(place, 1.5, "the run", on_lost=lost.set)
    saver = StepSaver(place, AsyncMode["async"], torch.device("cpu"), group, SaverOptions(ticket=lease.ticket))
    saver.save({"w": torch.randn(10)}, Manifest(step=1, lineage="a"))
    assert place.names() == []
    assert [r.error for r in saver.wait()] == [None]
    with pytest.raises(LeaseHeldError):
        acquire_lease(place, 1.5, "the run")
    time.sleep(1.0)
    assert not lost.is_set()
    saver.close()
    lease.release()


@pytest.mark.parametrize("what", ["lease", "folder"])
def test_a_removed_folder_or_lease_ends_saving_by_its_name(
    place: Storage, group: dist.ProcessGroup, what: str
) -> None:
    lease = acquire_lease(place, 60.0, "the run")
    saver = StepSaver(place, AsyncMode.disabled, torch.device("cpu"), group, SaverOptions(ticket=lease.ticket))
    assert [r.error for r in saver.save({"w": torch.randn(10)}, Manifest(step=1, lineage="a"))] == [None]
    for name in place.names():
        if what == "folder" or name.startswith("lease"):
            place.remove(name)
    (result,) = saver.save({"w": torch.randn(10)}, Manifest(step=2, lineage="a"))
    assert result.final
    assert result.error is not None
    assert "nothing more is saved" in result.error
    assert "another writer" not in result.error
    assert ("lease-1.json was removed" in result.error) == (what == "lease")
    assert [e.step for e in Catalog(place).entries(LINE)] == ([] if what == "folder" else [1])
    saver.close()
    lease.release()


def test_a_bucket_that_vanishes_is_no_takeover(
    server: int, group: dist.ProcessGroup, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(method: str, path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server, timeout=5)
        connection.request(method, path)
        assert connection.getresponse().status < 300
        connection.close()

    ask("PUT", "/vanishing")
    place = open_storage("s3://vanishing/run", options(server))
    lost = threading.Event()
    lease = acquire_lease(place, 0.9, "the run", on_lost=lost.set)
    committer = Committer(place, "t", lease.ticket)
    committer.check_lease(must_be_seen=True)
    # Everything in the server is gone.
    ask("POST", "/moto-api/reset")
    ask("PUT", "/bucket")
    with pytest.raises(LeaseLostError, match="s3://vanishing/run must stay .* was removed or emptied"):
        committer.check_lease(must_be_seen=True)
    assert lost.wait(10.0)
    assert "another writer" not in caplog.text
    lease.release()


def _arguments(corpus: Path, port: int, *more: str) -> list[str]:
    where = [f"+checkpoint.storage_options.{name}={value}" for name, value in options(port).items()]
    return tiny(
        corpus, "checkpoint.folder=s3://bucket/runs", "hooks=none",
        "checkpoint.interval=5", "checkpoint.keep_latest_k=2", "scheduler.total_steps=20",
        "data.global_batch_size=8", *where, *more,
    )  # fmt: skip


def test_a_run_resumes_from_the_store_on_other_ranks(corpus: Path, tmp_path: Path, proxy: BreakingProxy) -> None:
    two = ["parallel.dp_shard=2", "run.name=grown"]
    train(_arguments(corpus, proxy.port, "train.steps=10", *two), tmp_path / "run", 2)
    train(_arguments(corpus, proxy.port, "train.steps=20", *two), tmp_path / "run", 2)
    assert record(tmp_path / "run")["attempts"][-1]["from_step"] == 10
    train(_arguments(corpus, proxy.port, "train.steps=20", "run.name=whole", two[0]), tmp_path / "whole", 2)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    folder = open_storage("s3://bucket/runs/grown", options(proxy.port))
    assert Catalog(folder).candidates() == [15, 20]
    train(_arguments(corpus, proxy.port, "train.steps=22", "run.name=grown"), tmp_path / "run")
    assert record(tmp_path / "run")["attempts"][-1]["from_step"] == 20


def test_the_command_itself(corpus: Path, tmp_path: Path, proxy: BreakingProxy) -> None:
    arguments = _arguments(corpus, proxy.port, "train.steps=6", "run.name=command")
    code, out = regrow(arguments, tmp_path)
    assert code == 0, out
    assert "saved s3://bucket/runs/command/step-6" in out
    code, out = regrow([*arguments, "train.steps=8"], tmp_path)
    assert code == 0, out
    assert "state: step 6 of s3://bucket/runs/command/step-6, verified" in out
