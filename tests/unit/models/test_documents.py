"""Documents are described by where they begin: the same as a mask, in few numbers and few shapes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.models.documents import describe_documents, whole_sequences


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 10_000), st.floats(0, 1))
def test_starts_and_boundaries_say_what_the_numbers_say(rows: int, length: int, seed: int, often: float) -> None:
    torch.manual_seed(seed)
    numbers = (torch.rand(rows, length) < often).long().cumsum(1)
    documents = describe_documents(numbers)
    for row in range(rows):
        for at in range(length):
            first = int(documents.starts[row, at])
            same = numbers[row] == numbers[row, at]
            assert first == int(same.nonzero()[0])
    begins = [row * length + at for row in range(rows) for at in range(length) if documents.starts[row, at] == at]
    found = documents.boundaries.tolist()
    assert found == [*begins, *[rows * length] * (len(found) - len(begins))]
    assert len(found) > len(begins)
    assert documents.longest == length
    lengths = documents.boundaries.diff().tolist()
    assert max(lengths) <= documents.most <= min(length, 2 * max(lengths))
    assert documents.starts.dtype == documents.boundaries.dtype == torch.int32


def test_batches_with_documents_of_usual_lengths_have_the_same_shapes() -> None:
    found = []
    for documents in (1, 3, 4, 16, 17, 2048):
        numbers = (torch.arange(2048) * documents // 2048).expand(2, -1)
        found.append(len(describe_documents(numbers).boundaries) - 1)
    # Room for a document of 512 tokens each; doubled as often as needed.
    assert found == [8, 8, 8, 32, 64, 4096]


def test_whole_sequences_are_one_document_each() -> None:
    made = whole_sequences(3, 8, torch.device("cpu"))
    described = describe_documents(torch.zeros(3, 8, dtype=torch.long))
    assert torch.equal(made.starts, described.starts)
    assert torch.equal(made.boundaries, described.boundaries)
