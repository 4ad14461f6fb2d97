"""Every § in code and documents leads to a place in docs/protocol.md."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = ROOT / "docs/protocol.md"


def references():
    """(file, number) of every § in the repository's text files; `§4-2 to §4-6` and `§4-3, -5` count as they are written."""
    folders = ("model", "dataset", "utils", "tests", "benchmarks", "scripts", "docs", "assets")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*.*"))]
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        if file.suffix not in (".py", ".md", ".sh") or name.startswith("tests/golden/") or name == "utils/files.py":
            continue  # in the last § is a character
        text = file.read_text(encoding="utf-8")
        for found in re.finditer(r"§(\d+)(-\d+)?((?:, -\d+)*)", text):
            section, first, more = found.groups()
            yield name, section + (first or "")
            for other in re.findall(r"-\d+", more):
                yield name, section + other


def test_every_reference_resolves():
    anchors = set(re.findall(r'<a id="([\d-]+)"></a>', PROTOCOL.read_text(encoding="utf-8")))
    found = list(references())
    assert len(found) > 50
    assert sorted({(name, number) for name, number in found if number not in anchors}) == []


def test_links_within_the_protocol_resolve():
    text = PROTOCOL.read_text(encoding="utf-8")
    anchors = re.findall(r'<a id="([\d-]+)"></a>', text)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([\d-]+)\)", text)) <= set(anchors)
