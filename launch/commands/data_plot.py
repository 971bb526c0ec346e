"""`regrow-data show --plot`: a picture of the lengths of a store's documents."""

from pathlib import Path

from matplotlib.figure import Figure

from regrow.launch.commands.data_show import StoreFigures
from regrow.trainer.data.source import DataError

__all__ = ["plot_lengths"]

_ENDINGS = (".png", ".svg", ".pdf")


def plot_lengths(figures: StoreFigures, file: Path) -> None:
    """Draws which share of a store's documents, and of its tokens, documents of each length have.

    Args:
        figures: of the store.
        file: what is written; its ending says how.

    Raises:
        DataError: it cannot be written.
    """
    if file.suffix not in _ENDINGS:
        raise DataError(f"--plot must name a {', '.join(_ENDINGS)} file, but is {file}; use {file.stem}.png")
    # Without pyplot, which would look for a screen.
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    places = range(len(figures.lengths))
    for side, name, values, whole in (
        (-0.2, "documents", [b.documents for b in figures.lengths], figures.documents),
        (0.2, "tokens", [b.tokens for b in figures.lengths], figures.tokens),
    ):
        axes.bar([p + side for p in places], [100 * v / max(1, whole) for v in values], width=0.4, label=name)
    axes.set_xticks(list(places), [f"{b.shortest:,}" for b in figures.lengths], rotation=45, ha="right")
    axes.set_xlabel("tokens per document, from this power of two to the next")
    axes.set_ylabel("share (%)")
    axes.set_title(
        f"{figures.documents:,} documents, {figures.tokens:,} tokens, {figures.bytes_per_token:.2f} bytes per token"
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend()
    try:
        figure.savefig(file)
    except OSError as error:
        raise DataError(
            f"--plot must be a file that can be written, but {file} cannot ({error.strerror or error}); "
            "choose another one"
        ) from error
