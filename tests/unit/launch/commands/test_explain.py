"""`regrow explain`, `regrow --help`, and the page that is made of the same."""

import json
import re
import sys
from pathlib import Path

import pytest

from regrow.launch.commands.configuration_page import configuration_page
from regrow.launch.commands.explain import main
from regrow.launch.commands.explain_text import WIDTH
from regrow.launch.commands.help import help_text
from regrow.launch.commands.own_catalog import own_catalog
from regrow.launch.config import plugins
from regrow.launch.run.signals import StopFlag
from regrow.launch.train import COMMANDS, _run
from tests.support import REPO


def explain(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def explained(capsys: pytest.CaptureFixture[str], name: str) -> dict[str, object]:
    (found,) = json.loads(explain(capsys, name, "--json"))
    assert isinstance(found, dict)
    return found


def test_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    text = explain(capsys, "optimizer.lr")
    assert text.startswith("optimizer.lr\n  The schedule's highest learning rate.\n")
    for line in (
        "type      number",
        "default   0.001 (in conf/optimizer/adamw.yaml)",
        "in a run  hyperparameter: changes within a run only with run.allow_change=[optimizer.lr]",
        "set it    regrow optimizer.lr=VALUE, or several: regrow -m optimizer.lr=A,B",
    ):
        assert f"\n  {line}" in text


def test_a_fields_choices_have_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, "checkpoint.async_mode")
    choices = found["choices"]
    assert isinstance(choices, list)
    assert [c["name"] for c in choices] == ["disabled", "async", "async_with_pinned_mem"]
    assert all(c["meaning"] for c in choices)
    assert found["default"] == "async_with_pinned_mem"
    assert found["default_set_by"] == "conf/checkpoint/pinned.yaml"
    assert found["belongs_to"] == "free"


@pytest.mark.parametrize(
    ("name", "default", "belongs_to", "type_words"),
    [
        ("train.steps", 1000, "free", "whole number"),
        ("data.seq_len", 256, "identity", "whole number"),
        ("data.tokenizer", None, "location", "text or null"),
        ("seed", 0, "identity", "whole number"),
        ("hooks.progress.every", "${train.log_every}", "free", "whole number"),
        ("hydra.launcher.partition", None, "free", "text or null"),
    ],
)
def test_what_programs_are_told(
    name: str, default: object, belongs_to: str, type_words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(capsys, name)
    assert (found["default"], found["belongs_to"], found["type"]) == (default, belongs_to, type_words)


def test_a_field_that_schemas_have_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert "default   1e-05; 1e-06 with qwen3, qwen3_moe\n" in explain(capsys, "model.norm_eps")
    text = explain(capsys, "data.files")
    assert "of        data=text, data=chat\n" in text
    assert "default   []\n" in text
    assert "set it    regrow data.files=[A,B]; " in text
    assert "regrow 'data.stages=[{weights: VALUE, …}, …]'" in " ".join(
        explain(capsys, "data.stages.N.weights").split()
    )


def test_a_section_and_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    text = explain(capsys, "checkpoint")
    assert "Choose one with checkpoint=CHOICE (default pinned), of" in text
    assert re.search(r"\n    production +Every 1,000 steps or 30 minutes", text)
    assert "\n    checkpoint.interval = 500\n        Save every this many optimizer steps.\n" in text
    assert "Add one with +save_policy@checkpoint.save_policies.NAME=CHOICE, of" in explain(capsys, "save_policy")
    assert "\n  Fields\n    run.root = outputs\n" in explain(capsys, "run")


def test_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    text = explain(capsys, "model=llama3_debug")
    assert text.startswith("model=llama3_debug  (conf/model/llama3_debug.yaml)\n")
    assert "\n  Sets\n    model.name = llama3_debug\n" in text
    assert "\n    model.norm_eps = 1e-05\n" in text
    assert "n_experts" not in text
    text = explain(capsys, "hook/evaluation")
    assert "\n  regrow +hook@hooks.evaluation=evaluation\n" in text
    assert "\n    hooks.evaluation.every = 1000\n" in text
    assert "In every run, unless hooks.validation.enabled=false" in explain(capsys, "hook=validation")
    assert "\n    /save_policy@save_policies.minutes: minutes\n" in explain(capsys, "checkpoint=production")


def test_a_last_part_names_all_fields_that_end_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(explain(capsys, "micro_batch_size", "every", "--json"))
    names = [f["name"] for f in found]
    assert names[0] == "data.micro_batch_size"
    assert {"hooks.validation.every", "hooks.sample.every"} <= set(names)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("optimizer.lrr", "optimizer.lrr is no field, section, group or choice; did you mean optimizer.lr?"),
        ("optimzer.lr", "did you mean optimizer.lr?"),
        ("checkpont", "did you mean checkpoint?"),
        ("model=llama3_9b", "model=llama3_9b is no choice; model has llama3_"),
        ("xyzzy", "xyzzy is no field, section, group or choice; regrow explain lists all"),
    ],
)
def test_an_unknown_name(name: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert sentence in err
    assert main([name, "--json"]) == 2
    assert sentence in json.loads(capsys.readouterr().out)["error"]


def test_the_whole_list_has_every_field_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = explain(capsys)
    fields = re.findall(r"^ *([a-z_]+(?:\.[\w]+)*) = |^    ([\w.]+)$|^(logger|mode|seed)$", text, re.MULTILINE)
    named = {name for names in fields for name in names if name}
    assert set(own_catalog().entries) <= named
    assert not [line for line in text.splitlines() if len(line) > WIDTH and " = " not in line]


def test_a_users_package_is_explained_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, path = plugins.active_packages(), list(sys.path)
    package = tmp_path / "explained_lab"
    (package / "conf" / "hook").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "config.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom regrow.trainer.config import HookConfig\n"
        "@dataclass(kw_only=True, slots=True)\nclass BellConfig(HookConfig):\n"
        '    """Rings.\n\n    Attributes:\n        times: how often.\n    """\n'
        '    SCHEMA: ClassVar = ("hook", "bell_schema")\n    times: int = 3\n'
    )
    (package / "conf/hook/bell.yaml").write_text("# A bell.\ndefaults: [bell_schema, _self_]\ntimes: 5\n")
    (tmp_path / "pyproject.toml").write_text('[tool.regrow]\npackages = ["explained_lab"]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGROW_PACKAGES", raising=False)
    try:
        text = explain(capsys, "hooks.bell.times")
        assert "How often." in text
        assert "default   5 (in conf/hook/bell.yaml)" in text
        assert re.search(r"hook +begin, bell, ", help_text(COMMANDS))
    finally:
        plugins._active = before
        sys.path[:] = path
        for name in [n for n in sys.modules if n.startswith("explained_lab")]:
            del sys.modules[name]


def test_help_names_commands_groups_and_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["--help"], StopFlag()) == 0
    text = capsys.readouterr().out
    catalog = own_catalog()
    for name in ("regrow explain [NAME …]", "regrow-ckpt", "regrow-sweep", "regrow-new DIR", "regrow --hydra-help"):
        assert f"\n  {name} " in text
    for field in catalog.root.fields:
        assert f"\n  {field.name} " in text
    flat = " ".join(text.split())
    for group in catalog.groups.values():
        assert not [c for c in group.choices if c not in flat]
    assert "llama3_debug*" in flat


def test_every_command_of_the_table_has_a_line_in_help() -> None:
    text = help_text(COMMANDS)
    assert not [word for word in COMMANDS if f"\n  regrow {word}" not in text]


def test_the_page_of_the_configuration_is_up_to_date() -> None:
    page = (REPO / "docs/configuration.md").read_text()
    assert page == configuration_page(), "write it anew with `make reference`"


def test_the_page_lists_each_field_once() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|.*\|.*\|.*\|", configuration_page(), re.MULTILINE)
    fields = [row for row in rows if row in own_catalog().entries]
    print(f"{len(fields)} fields")
    assert sorted(fields) == sorted(own_catalog().entries)
