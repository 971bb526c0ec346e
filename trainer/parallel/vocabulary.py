"""A vocabulary whose logits are sharded over ranks: what the ranks tell each other, so that nobody gathers them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.trainer.parallel.collectives import all_gather_no_grad

__all__ = ["VocabularyShard"]

# No sum of exponents is larger, which might be infinite in float32; divided by this, all shares are 0 as well.
_LARGEST = 1e30


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyShard:
    """This rank's part of the vocabulary.

    Attributes:
        first: its first token.
        count: its tokens.
        largest: tokens of the largest part.
        group: the ranks' process group.
    """

    first: int
    count: int
    largest: int
    group: str

    @classmethod
    def of(cls, vocabulary: int, rank: int, ranks: int, group: str) -> "VocabularyShard":
        """As a matrix is sharded by rows: the last ranks may have fewer, or none.

        Args:
            vocabulary: tokens in all.
            rank: of `ranks`.
            ranks: of the group.
            group: its name.
        """
        largest = -(-vocabulary // ranks)
        first = min(rank * largest, vocabulary)
        return cls(first=first, count=min(first + largest, vocabulary) - first, largest=largest, group=group)

    def holds(self, tokens: Tensor) -> Tensor:
        """Which tokens are in this part; bool, of the tokens' shape."""
        return (tokens >= self.first) & (tokens < self.first + self.count)

    def join(self, highest_R1: Tensor, sums_R1: Tensor, targets_R1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the rows of all parts come to; a collective, of three numbers a row.

        Args:
            highest_R1: each row's highest logit here.
            sums_R1: the exponents of its logits here, less `highest_R1`, summed.
            targets_R1: the logit of its label, 0 where that is elsewhere.

        Returns:
            The logarithm of the sum of all exponents and the logit of the label, both float64 `(R, 1)`, and that sum
            in units of this rank's `sums_R1`, in their dtype.
        """
        own_R3 = torch.cat([highest_R1, sums_R1, targets_R1], dim=1).to(torch.float64)
        every_NR3 = all_gather_no_grad(own_R3, self.group).view(-1, *own_R3.shape)
        top_R = every_NR3[..., 0].amax(0)
        totals_R = (every_NR3[..., 1] * (every_NR3[..., 0] - top_R).exp()).sum(0)
        here_R1 = (totals_R * (top_R - own_R3[:, 0]).exp())[:, None].clamp(max=_LARGEST)
        return (
            (totals_R.log() + top_R)[:, None],
            every_NR3[..., 2].sum(0)[:, None],
            here_R1.to(sums_R1.dtype),
        )
