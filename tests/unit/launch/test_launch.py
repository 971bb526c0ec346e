"""What happens before Hydra: ranks, threads, folders, names of a sweep's runs, hints."""

import errno
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from omegaconf import open_dict

from regrow.launch.config.errors import UserError, check_no_hub_name, naming_fields
from regrow.launch.config.hints import nearest, quoted_override
from regrow.launch.config.identity import former_sweep_name, sweep_name
from regrow.launch.config.overrides import is_multirun, swept_keys
from regrow.launch.config.run_name import register_resolver
from regrow.launch.run.ranks import Ranks, detect_ranks, forget_ranks
from regrow.launch.run.threads import threads_per_rank
from regrow.trainer import places
from tests.support import REPO

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    "left",
    [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": ""}, {"RANK": "1", "WORLD_SIZE": " "},
     {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}, {"RANK": "0", "SLURM_PROCID": ""}],
)  # fmt: skip
def test_half_of_torchruns_variables_is_none(left: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect_ranks(left, 1) is None
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    forget_ranks()
    assert not [n for n in left if n in os.environ and not n.startswith("SLURM")]


@given(
    changed=st.dictionaries(
        st.sampled_from(sorted(TORCHRUN)), st.sampled_from(["-1", "0", "1", "2", "4", "5", "x", "1.0", "", "9" * 30])
    )
)
def test_torchruns_variables_fit_or_are_refused(changed: dict[str, str]) -> None:
    environ = {**TORCHRUN, **changed}
    try:
        ranks = detect_ranks(environ, None)
    except ValueError as error:
        assert any(f"{name} must be" in str(error) for name in TORCHRUN)
        assert "unset RANK" in str(error)
        return
    if not environ["RANK"] or not environ["WORLD_SIZE"]:
        assert ranks is None
        return
    assert isinstance(ranks, Ranks)
    assert 0 <= ranks.rank < ranks.world_size
    assert 0 <= ranks.local_rank < ranks.local_world_size <= ranks.world_size
    assert 0 <= ranks.port < 65536


@pytest.mark.parametrize(
    ("wanted", "environ", "local_ranks", "threads", "said"),
    [
        (0, {}, 1, 0, ""),
        (0, {"OMP_NUM_THREADS": "3"}, 1, 3, ""),
        (0, {"OMP_NUM_THREADS": "4,2"}, 1, 4, ""),
        (0, {"OMP_NUM_THREADS": "many"}, 1, 0, "OMP_NUM_THREADS must be a whole number"),
        (2, {"OMP_NUM_THREADS": "3"}, 1, 2, "launch.threads_per_rank=2 is used, not OMP_NUM_THREADS=3"),
        (3, {"OMP_NUM_THREADS": "3"}, 1, 3, ""),
        (0, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "a"}, 2, 0, "is torchrun's default"),
        (0, {"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "a"}, 2, 2, ""),
    ],
)
def test_threads(
    wanted: int,
    environ: dict[str, str],
    local_ranks: int,
    threads: int,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    assert threads_per_rank(wanted, environ, local_ranks=local_ranks) == threads
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


def test_a_user_without_a_home_gets_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a user namespace the entry is really missing; here, what is done then."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    cache = places.user_cache()
    assert cache == tmp_path / f"regrow-user-{os.getuid()}" / "cache"
    assert places.user_cache() == cache
    assert cache.parent.stat().st_mode & 0o777 == 0o700
    # Somebody else's folder of that name is not trusted.
    cache.parent.chmod(0o777)
    assert places.user_cache().parent != cache.parent
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert places.user_cache() == tmp_path / "home/.cache/regrow"


KEYS = ["optimizer.lr", "seed", "model", "data.seq_len", "scheduler.decay_ratio", "checkpoint.initial_load_path"]


@given(
    pairs=st.dictionaries(
        st.sampled_from(KEYS),
        st.one_of(st.integers(), st.floats(), st.text(st.sampled_from("aä/ .=,€\\"), max_size=300)),
    ),
    digest=st.sampled_from(["", "4cefc56d"]),
)
def test_names_of_a_sweep_show_every_field_and_are_folder_names(pairs: dict[str, Any], digest: str) -> None:
    name = sweep_name("llama3_debug", list(pairs.items()), digest)
    assert name is not None
    assert len(name.encode()) <= 200
    assert "/" not in name
    assert name.isascii()
    for key, value in pairs.items():
        assert f"{key}=" in name
        if isinstance(value, int) and len(str(value)) <= 8:
            assert f"{key}={value}" in name
    assert name.startswith("llama3_debug")
    assert name.endswith(digest)


def test_names_of_a_sweep_that_do_not_fit_are_none() -> None:
    assert sweep_name("m", [(f"a_section.a_field_with_a_long_name_{i}", 1) for i in range(9)], "4cefc56d") is None
    long = [("data.files", "['" + "x" * 400 + f"{i}.txt']") for i in range(2)]
    assert len({sweep_name("m", [pair], "") for pair in long}) == 2


def in_sweep(swept: list[str], *overrides: str) -> str:
    """The name of a sweep's job."""
    register_resolver(swept)
    try:
        with initialize_config_module("regrow.conf", version_base="1.3"):
            config = compose("config", overrides=[*overrides, "hydra.mode=MULTIRUN"], return_hydra_config=True)
        with open_dict(config):
            config.hydra.overrides.task = list(overrides)
        return str(config.run.name)
    finally:
        register_resolver()


@pytest.mark.slow
def test_what_is_swept_comes_first_and_constants_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    constants = ["data.seq_len=64", "model.n_layers=2", "train.steps=9", "data.eos_token=" + "x" * 200]
    names = [
        in_sweep(["optimizer.lr", "seed"], *constants, f"optimizer.lr={lr}", "seed=1") for lr in ("1e-3", "3e-4")
    ]
    assert [n.rpartition("-")[0] for n in names] == [
        "llama3_debug-optimizer.lr=0.001,seed=1",
        "llama3_debug-optimizer.lr=0.0003,seed=1",
    ]
    # Another constant makes another run, and another folder.
    assert in_sweep(["seed"], "seed=1", "data.seq_len=64") != in_sweep(["seed"], "seed=1", "data.seq_len=32")
    # A sweep of one is the run that the same command without a launcher makes.
    with initialize_config_module("regrow.conf", version_base="1.3"):
        alone = compose("config", overrides=["seed=7"]).run.name
    assert in_sweep([], "seed=7") == alone
    with pytest.raises(Exception, match=r"train.steps must not be swept alone"):
        in_sweep(["train.steps"], "train.steps=9")


def test_a_run_under_its_former_name_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given_ = ["data.seq_len=64", "seed=1"]
    former = former_sweep_name("llama3_debug", [("data.seq_len", 64), ("seed", 1)])
    assert former == "llama3_debug-data.seq_len=64,seed=1"
    new = in_sweep(["seed"], *given_)
    assert new != former
    (tmp_path / "outputs" / former).mkdir(parents=True)
    assert in_sweep(["seed"], *given_) == new
    (tmp_path / "outputs" / former / "run.json").write_text("{}")
    assert in_sweep(["seed"], *given_) == former


def test_what_is_swept_is_seen_on_the_command_line() -> None:
    assert swept_keys(["-m", "seed=1,2", "data.files=[a,b]", "optimizer.lr=range(1,4)", "train.steps=["]) == [
        "seed",
        "optimizer.lr",
    ]
    assert swept_keys(["seed=1,2", "hydra/launcher=slurm"]) == ["seed"]
    assert swept_keys(["seed=1,2"]) == []
    assert is_multirun(["hydra.mode=MULTIRUN"])


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EACCES, "check it"), (errno.ENOENT, "check it"), (errno.EDQUOT, "free some space"), (errno.EIO, "check it"),
     (errno.ENOSPC, "free some space"), (errno.EROFS, "check it"), (errno.ESTALE, "check it")],
)  # fmt: skip
def test_an_operating_systems_error_names_the_field_of_its_path(number: int, remedy: str, tmp_path: Path) -> None:
    places_ = [
        ("run.root", tmp_path / "out"),
        ("data.cache", tmp_path / "out/cache"),
        ("data.files", tmp_path / "in"),
    ]
    for path, field in (
        (tmp_path / "out/run/x", "run.root"), (tmp_path / "out/cache/y", "data.cache"), (tmp_path / "in/a", "data.files"),
        (None, "run.root"), (tmp_path / "elsewhere", ""),
    ):  # fmt: skip
        error = (
            OSError(number, os.strerror(number)) if path is None else OSError(number, os.strerror(number), str(path))
        )
        with pytest.raises(UserError) as caught, naming_fields(*places_):
            raise error
        said = str(caught.value)
        assert os.strerror(number) in said
        assert str(path or tmp_path / "out") in said
        if path is None and remedy == "check it":
            assert all(f"{name} ({place})" in said for name, place in places_)
            continue
        assert said.startswith(f"{field} must be" if field else str(path))
        assert remedy in said or not field


def test_a_sentence_of_our_own_passes() -> None:
    with pytest.raises(FileNotFoundError, match="as it is"), naming_fields(("run.root", "x")):
        raise FileNotFoundError("as it is")


def test_names_on_the_hub_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (
        "meta-llama/Llama-3.2-1B",
        "https://huggingface.co/meta-llama/Llama-3.2-1B",
        "hf://meta-llama/Llama-3.2-1B",
    ):
        with pytest.raises(UserError, match=r"hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B"):
            check_no_hub_name("model.path", value)
    (tmp_path / "a/b").mkdir(parents=True)
    for value in ("a/b", "./x/y", "/x/y/z", "x", "s3://a/b", "~/x"):
        check_no_hub_name("model.path", value)


def test_a_misspelt_name_is_not_another_name() -> None:
    assert nearest("modle", ["mode", "model", "wandb"]) == "model"
    assert nearest("fp16", ["bf16", "fp32", "fp64"]) is None
    assert nearest("bf1", ["bf16", "fp32", "fp64"]) == "bf16"
    assert nearest("trian", ["train", "run"]) == "train"
    assert nearest("llama3_9b", ["llama3_8b", "llama3_1b", "qwen3_8b"]) in ("llama3_8b", "llama3_1b")


@settings(max_examples=25)
@given(
    name=st.text(st.sampled_from("ab1ä€();:!`=&|#~ .-_'"), min_size=1, max_size=12).map(lambda t: f"x{t}y"),
    bracket=st.sampled_from(["", "[1]", "[a,b]", "{c}"]),
)
def test_quotes_make_any_file_name_readable(name: str, bracket: str) -> None:
    name += bracket
    for form in (f"run.root={name}", f"data.files=[{name}]", f"data.files=[a.txt,{name},b.txt]"):
        quoted = quoted_override(form)
        assert quoted is not None
        (word,) = shlex.split(quoted)
        found = OverridesParser.create().parse_override(word).value()
        texts = [str(getattr(x, "text", x)) for x in (found if isinstance(found, list) else [found])]
        assert name in texts
        assert len(texts) == 1 + form.count(".txt")


def test_cleaning_keeps_the_runs() -> None:
    recipe = (REPO / "Makefile").read_text().partition("\nclean:")[2]
    assert "outputs build" not in recipe
    assert "rm -rf build" in recipe
