"""docs/systems.md"""

import re

from tests.support.processes import ROOT
from tests.systems.test_mistakes import MISTAKES
from tests.systems.test_systems import SYSTEMS


def test_the_page_names_every_row():
    """docs/systems.md has a row for each system and each mistake, under the same name, and no other."""
    page = (ROOT / "docs" / "systems.md").read_text()
    named = re.findall(r"^\| \*\*(.+?)\*\*", page, re.MULTILINE)
    rows = [row.id for row in SYSTEMS + MISTAKES]
    rows += ["StyleGAN lazy R1", "no create_graph", "no epsilon at a zero gradient"]
    assert sorted(named) == sorted(rows)
