"""`regrow --help`: what Regrow is, its commands, and what can be chosen and set."""

import ast
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

from regrow.launch.commands.explain_text import sentence, wrapped
from regrow.launch.commands.own_catalog import own_catalog, whole_catalog
from regrow.launch.config.catalog import Catalog
from regrow.launch.config.plugins import PackageError

__all__ = ["help_text"]

_HEADER = """Regrow trains language models; cut a run down anywhere, the same command grows it back.

Usage: regrow [FIELD=VALUE | GROUP=CHOICE] …        one run; the same command again continues it
       regrow -m FIELD=A,B …                        a sweep: a run for each combination of values
       regrow COMMAND …                             see Commands

Examples
  regrow train.steps=200                            one run, in outputs/<model>-<hash>
  regrow train.steps=200                            the same again: continues where it stopped
  regrow checkpoint.load_step=100                   goes back to step 100 and continues from there
  regrow parallel=fsdp parallel.dp_shard=2          two ranks, started here
  regrow -m optimizer.lr=1e-3,3e-4 seed=1,2         a sweep of four runs
  regrow -m hydra/launcher=slurm seed=1,2           the same on Slurm
"""
_FOOTER = """Learn more
  regrow explain                 every field and choice, page by page
  regrow explain optimizer.lr    one field: meaning, type, default, choices; also a section, a group, a choice
  regrow --cfg job               the composed config, with what else is on the command line
  regrow --info defaults         which files it is composed of
  regrow --hydra-help            the options of Hydra, which composes it
  regrow --version               Regrow's version
"""
# The programs that are installed beside `regrow`.
_PROGRAMS = ("checkpoint", "data", "evaluate", "generate", "sweep", "new")


def help_text(commands: Mapping[str, str]) -> str:
    """The whole text.

    Args:
        commands: modules by the words that begin a command of their own.
    """
    modules = [*commands.values(), *(f"regrow.launch.commands.{name}" for name in _PROGRAMS)]
    try:
        catalog, notes = whole_catalog(), []
    except PackageError as error:
        # Help is what is asked for where something is wrong.
        catalog, notes = own_catalog(), [f"Your own packages are left out: {error}", ""]
    return "\n".join(
        [_HEADER, *_commands(modules), "", *_groups(catalog), "", *_sections(catalog), "", *notes, _FOOTER]
    )


def _commands(modules: Iterable[str]) -> Iterable[str]:
    yield "Commands"
    for module in modules:
        command, _, summary = _docstring(module).partition(": ")
        yield from wrapped(sentence(summary), f"  {command.strip('`'):31}", 33)


def _docstring(module: str) -> str:
    """A module's first sentence, which begins with its command; read from its file, since some import torch."""
    spec = importlib.util.find_spec(module)
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) if spec is not None and spec.origin else None
    return " ".join((text or module).partition("\n\n")[0].split())


def _groups(catalog: Catalog) -> Iterable[str]:
    yield "Groups: choose with GROUP=CHOICE"
    for group in catalog.groups.values():
        if group.choices:
            chosen = catalog.chosen.get(group.name)
            names = [f"{name}*" if name == chosen else name for name in group.choices]
            yield from wrapped(", ".join(names), f"  {group.name:16}", 18)
    yield "  (* unless another one is chosen)"


def _sections(catalog: Catalog) -> Iterable[str]:
    yield "Sections: set their fields with SECTION.FIELD=VALUE"
    for field in catalog.root.fields:
        yield from wrapped(sentence(field.meaning), f"  {field.name:16}", 18)
