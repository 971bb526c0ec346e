"""Every YAML composes, names and hashes, and what a user gets wrong."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from regrow.checkpoint.policy.retention import RetentionRule
from regrow.checkpoint.policy.save import SavePolicy
from regrow.errors import ConfigError
from regrow.launch.config.errors import UserError, check_arguments
from regrow.launch.config.identity import compare, config_hash, flatten, is_free
from regrow.launch.config.resolve import construct, resolve
from regrow.launch.run.preflight import check_config
from regrow.launch.run.ranks import detect_ranks
from regrow.trainer.hook import Hook
from tests.support import REPO, compose_config, settings_of, typed_config

GROUPS = [
    "model",
    "parallel",
    "checkpoint",
    "data",
    "optimizer",
    "scheduler",
    "precision",
    "logger",
    "hooks",
]
NEEDED = {
    "data=tokens": ["data.path=x"],
    "checkpoint=finetune": ["checkpoint.initial_load_path=x"],
    "model=from_hf": [f"model.path={REPO / 'tests/interop/qwen3_folder'}"],
}
CHOICES = {g: [f"{g}={p.stem}" for p in sorted((REPO / "conf" / g).glob("*.yaml"))] for g in GROUPS}


@pytest.mark.parametrize("number", range(max(len(of_group) for of_group in CHOICES.values())))
def test_every_choice_composes_and_converts(number: int) -> None:
    """One of each group at a time: composing takes long, and groups do not depend on each other."""
    choices = [of_group[number % len(of_group)] for of_group in CHOICES.values()]
    config = typed_config([*choices, *(value for choice in choices for value in NEEDED.get(choice, []))])
    assert config.run.name


@pytest.mark.parametrize("path", sorted((REPO / "conf" / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_composes_and_converts(path: Path) -> None:
    assert typed_config([f"experiment={path.stem}"]).run.name


def test_every_hook_can_be_added(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text('{"text": "a text"}\n')
    needed = [f"hooks.my_evaluation.tasks=[{tmp_path}]"]
    names = [p.stem for p in sorted((REPO / "conf" / "hook").glob("*.yaml"))]
    config = typed_config(["hooks=none", *(f"+hook@hooks.my_{name}={name}" for name in names), *needed])
    for name in names:
        own = config.hooks[f"my_{name}"]
        assert type(construct(own._target_, f"hooks.my_{name}", Hook, own)).__name__.endswith("Hook")


@pytest.mark.parametrize(
    "group", ["save_policy@checkpoint.save_policies", "retention_rule@checkpoint.retention_rules"]
)
def test_every_policy_and_rule_can_be_added(group: str) -> None:
    folder, section = group.split("@")
    names = [p.stem for p in (REPO / "conf" / folder).glob("*.yaml")]
    config = typed_config([f"+{group}.my_{name}={name}" for name in names])
    items = getattr(config.checkpoint, section.split(".")[1])
    assert set(items) >= {f"my_{name}" for name in names}
    base: type[SavePolicy] | type[RetentionRule] = SavePolicy if folder == "save_policy" else RetentionRule
    for item in items.values():
        construct(item._target_, section, base, item)


def test_the_references_full_example_composes() -> None:
    """The last example of torchtitan's checkpointing page, as overrides."""
    overrides = {
        "enable": "true", "folder": "checkpoint", "interval": "500", "load_step": "-1",
        "last_save_model_only": "true", "export_dtype": "bfloat16", "async_mode": "async",
        "exclude_from_loading": "[]", "last_save_in_hf": "false", "initial_load_in_hf": "false",
        "create_seed_checkpoint": "false",
    }  # fmt: skip
    config = typed_config([f"checkpoint.{k}={v}" for k, v in overrides.items()])
    assert config.checkpoint.async_mode.name == "async"
    assert config.checkpoint.export_dtype.name == "bfloat16"
    check_config(config)


@pytest.mark.parametrize("choice", ["checkpoint=seed", "checkpoint=export_hf", "checkpoint.export.every_n=5"])
def test_policies_are_accepted(choice: str) -> None:
    check_config(typed_config([choice]))


def test_from_hf_becomes_the_familys_config() -> None:
    needed = NEEDED["model=from_hf"]
    config = typed_config(["model=from_hf", *needed, "model.max_seq_len=128"])
    assert (type(config.model).__name__, config.model.max_seq_len) == ("Qwen3Config", 128)
    assert config.run.name.startswith("qwen3_folder-")
    stored = settings_of(["model=from_hf", *needed])
    assert stored["model"]["head_dim"] == 32
    # Where the folder lies does not make another run of it.
    moved = {**stored, "model": {**stored["model"], "hf_assets_path": "/elsewhere"}}
    assert compare(stored, moved) == ([], [])


def test_defaults_are_the_references() -> None:
    checkpoint = typed_config([]).checkpoint
    assert (checkpoint.load_step, checkpoint.export_dtype.name) == (-1, "float32")
    assert (checkpoint.last_save_model_only, checkpoint.last_save_in_hf) == (False, False)
    assert (checkpoint.interval, checkpoint.keep_latest_k, checkpoint.folder) == (500, 10, "checkpoint")


def name_of(*overrides: str) -> str:
    return str(compose_config(overrides).run.name)


def test_names_follow_what_a_run_is() -> None:
    name = name_of()
    assert re.fullmatch(r"llama3_debug-[0-9a-f]{8}", name)
    free = ["train.steps=7", "checkpoint=debug", "launch.max_restarts=2", "parallel=fsdp", "hooks=none", "logger=wandb",
            "data.micro_batch_size=2", "run.root=x", "train.compile=true"]  # fmt: skip
    for override in free:
        assert name_of(override) == name, override
    for override in ("optimizer.lr=1e-4", "seed=1", "model.n_layers=2", "data.seq_len=64", "precision=bf16",
                     "scheduler=cosine", "train.grad_clip=2.0"):  # fmt: skip
        assert name_of(override) != name, override
    assert name_of("optimizer.lr=1.0e-3") == name_of("optimizer.lr=0.001")


def test_comparing_tells_identity_from_hyperparameters_from_the_rest() -> None:
    stored = settings_of([])
    given_ = settings_of(["optimizer.lr=1e-4", "model.n_layers=2", "train.steps=9", "seed=4", "data.prefetch=5"])
    identity, hyperparameters = compare(stored, given_)
    assert [d.name for d in identity] == ["model.n_layers", "seed"]
    assert [str(d) for d in hyperparameters] == ["optimizer.lr is 0.0001 where the run has 0.001"]
    assert compare(stored, stored) == ([], [])
    newer = {**stored, "optimizer": {**stored["optimizer"], "brand_new": 1}}
    assert compare(stored, newer) == ([], [])


def test_free_fields() -> None:
    for name in (
        "train.steps",
        "checkpoint",
        "checkpoint.load_step",
        "parallel",
        "parallel.tp",
        "hooks",
        "logger",
        "run.root",
    ):
        assert is_free(name), name
    for name in ("model", "optimizer", "optimizer.lr", "seed", "data.seq_len", "scheduler", "precision"):
        assert not is_free(name), name


def test_hash_ignores_order() -> None:
    config = settings_of([])
    assert config_hash(config) == config_hash(dict(reversed(config.items())))
    assert "optimizer.lr" in flatten(config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint.load_step", "500"], "write checkpoint.load_step=500"),
        (["--checkpoint.load_step=500"], "write checkpoint.load_step=500"),
        (["checkpoint.exclude_from_loading=a,b"], "write checkpoint.exclude_from_loading=[a,b]"),
        (["--checkpoint.exclude_from_loading", "data_loader,lr_scheduler"], "=[data_loader,lr_scheduler]"),
        (["-m", "seed=1,2", "run.name=a"], "run.name must differ between the runs of a sweep"),
        (["-m", "train.steps=5,10"], "train.steps must not be swept alone"),
        (["-m", "parallel=single,fsdp"], "parallel must not be swept alone"),
    ],
)
def test_forms_that_would_be_misread_are_corrected(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_arguments(arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [["-m", "seed=1,2"], ["-m", "seed=1,2", "run.name='a-${seed}'"], ["-m", "train.steps=5,9", "run.name=a,b"],
     ["seed=1"], ["checkpoint.exclude_from_loading=[a,b]"], ["--cfg", "job"]],
)  # fmt: skip
def test_right_forms_pass(arguments: list[str]) -> None:
    check_arguments(arguments)


@pytest.mark.parametrize(
    "target", ["os.system", "builtins.eval", "subprocess.run", "regrow.trainer.nothing.X", "trainer.loop.Trainer"]
)
def test_targets_outside_our_packages_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="_target_ must"):
        resolve(target, "hooks.x", Hook)


def test_ranks_come_from_torchrun_or_a_fitting_srun() -> None:
    assert detect_ranks({}, 2) is None
    torchrun = detect_ranks({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, 2)
    assert torchrun is not None
    assert (torchrun.rank, torchrun.local_rank) == (1, 0)
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
    }
    srun = detect_ranks(slurm, 4)
    assert srun is not None
    assert (srun.rank, srun.world_size, srun.local_world_size) == (3, 4, 2)
    assert detect_ranks(slurm, 1) is None


@pytest.mark.slow
def test_config_and_help_are_readable() -> None:
    import sys

    def run(*arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "regrow.launch.train", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout

    help_text = run("--help")
    assert "llama3_1b" in help_text
    assert "regrow -m optimizer.lr=1e-3,3e-4" in help_text
    job = run("--cfg", "job")
    assert "interval: 500" in job
    assert "n_kv_heads: 3" in job
    defaults = run("--info", "defaults")
    assert defaults.count("\n| model/llama3_debug ") == 1


def test_settings_are_json() -> None:
    assert json.loads(json.dumps(settings_of([]))) == settings_of([])
