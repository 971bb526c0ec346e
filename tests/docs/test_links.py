"""Links between pages lead somewhere, and files that the architecture names are there."""

import re

from tests.docs.test_pages import PAGES
from tests.support import REPO


def test_links_between_pages_lead_somewhere() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())]
    assert len(links) > 30
    assert not [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]


def test_the_architecture_names_files_that_are_there() -> None:
    text = (REPO / "docs/architecture.md").read_text()
    files = re.findall(r"\b(?:launch|trainer|checkpoint|models|tests)/[\w/]+\.py\b", text)
    assert len(files) > 20
    assert not [name for name in files if not (REPO / name).is_file()]
