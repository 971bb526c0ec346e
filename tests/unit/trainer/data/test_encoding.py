"""Documents become the ids that their tokenizer gives them, between the marks that are asked for."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.trainer.data.config import TextConfig
from regrow.trainer.data.encoding import DocumentMarks, encode_documents
from regrow.trainer.data.prepare import prepare
from regrow.trainer.data.source import DataError
from regrow.trainer.data.text import TextSource
from regrow.trainer.data.token_bytes import bytes_of_tokens
from regrow.trainer.data.token_store import TokenStore
from regrow.trainer.data.tokenizer import load_tokenizer
from tests.unit.trainer.data.chat.families import FAMILIES
from tests.unit.trainer.data.conftest import AllMade


@settings(max_examples=30)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=70),
    name=st.sampled_from(sorted(FAMILIES)),
    begin=st.sampled_from([None, 3]),
)
def test_ids_are_those_of_the_tokenizer(made: AllMade, texts: list[str], name: str, begin: int | None) -> None:
    tokenizer = made[name].tokenizer
    found = [d.ids.tolist() for d in encode_documents(iter(texts), tokenizer, DocumentMarks(7, begin))]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert found == [[*([] if begin is None else [begin]), *i, 7] for i in ids if i]


def test_a_token_before_each_document(made: AllMade, tmp_path: Path) -> None:
    """Another store than that without one, and no more bytes of text."""
    (tmp_path / "a.jsonl").write_text('{"text": "the weather"}\n{"text": ""}\n{"text": "in Paris"}\n')

    def source(bos_token: str | None) -> TextSource:
        files, tokenizer = [str(tmp_path / "a.jsonl")], str(made["llama3"].folder)
        cache = str(tmp_path / "cache")
        return TextSource(TextConfig(files=files, tokenizer=tokenizer, cache=cache, workers=1, bos_token=bos_token))

    stores = {bos: TokenStore(prepare(source(bos))) for bos in (None, "<|begin_of_text|>")}
    tokenizer = load_tokenizer(stores[None].tokenizer_file)
    begin, end = (tokenizer.token_to_id(t) for t in ("<|begin_of_text|>", "<|eot_id|>"))
    plain, marked = (np.empty(s.index.tokens, dtype=np.int64) for s in stores.values())
    for store, ids in zip(stores.values(), (plain, marked), strict=True):
        store.read(0, ids)
    ends = np.flatnonzero(plain == end)
    assert len(ends) == 2
    first, second = plain[: ends[0] + 1].tolist(), plain[ends[0] + 1 :].tolist()
    assert marked.tolist() == [begin, *first, begin, *second]
    sizes = bytes_of_tokens(tokenizer)
    assert sizes[plain].sum() == sizes[marked].sum() == len("the weather") + len("in Paris")
    with pytest.raises(
        DataError, match=r"data.bos_token must name a token of .*, but none of <x> is one; set data.bos_token"
    ):
        prepare(source("<x>"))
