"""A folder, transformers' tokenizer and ours for each family."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from regrow.trainer.data.chat.template import ChatTemplate
from regrow.trainer.data.chat.template_files import read_chat_template
from regrow.trainer.data.tokenizer import load_tokenizer
from tests.unit.trainer.data.chat.families import FAMILIES, save_family


@dataclass(frozen=True)
class Made:
    """A family's tokenizer: the folder, as transformers loads it, and as we do."""

    folder: Path
    reference: Any
    template: ChatTemplate
    tokenizer: Tokenizer


class AllMade(dict[str, Made]):
    """By family."""

    def __repr__(self) -> str:
        return "made"  # hypothesis prints what a test is given


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> AllMade:
    found = AllMade()
    for name, family in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        save_family(folder, family)
        found[name] = Made(
            folder,
            AutoTokenizer.from_pretrained(folder),
            read_chat_template(folder),
            load_tokenizer(folder / "tokenizer.json"),
        )
    return found
