"""README and docs: links and paths lead somewhere, and the Python examples run as they are printed."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import PromptEncoder

from dataset.mini.write import write_reason_seg

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md", ROOT / "assets/mini/README.md", ROOT / "assets/read-mini-base/README.md",
]  # fmt: skip
FOLDERS = (".ci", "assets", "benchmarks", "dataset", "docs", "model", "scripts", "tests", "utils")
FILES = (".py", ".sh", ".md", ".toml")
"""A name with one of these suffixes and without a folder is a file of the root, or of the document's own folder."""


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def prose_of(text: str) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors_of(document: Path) -> set[str]:
    """What `#...` may say: ids that are written out, and headings as GitHub names them."""
    text = prose_of(text_of(document))
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return names | set(re.findall(r'<a id="([^"]+)">', text))


def dead_links(document: Path) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(text_of(document))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            dead.append(link)
    return dead


def dead_paths(document: Path) -> list[str]:
    """Paths of this repository in backticks that are not there; a word of a command counts too."""
    dead = []
    for span in re.findall(r"`([^`\n]+)`", prose_of(text_of(document))):
        for word in span.split():
            is_path = re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*/?", word) and "..." not in word
            ours = word.split("/")[0] in FOLDERS if "/" in word else word.endswith(FILES)
            if is_path and ours and not any((folder / word).exists() for folder in (ROOT, document.parent)):
                dead.append(word)
    return dead


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    assert dead_links(document) == []
    assert dead_paths(document) == []


def test_dead_links_and_paths_are_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "# One title\n[a](b.md) [c](#one-title) [d](#two) [e](https://f.g)\n"
        "`model/none.py` `model/read.py` `python gone.py --out runs/x` `rui-qian/READ` `coco/train2017`\n"
        "```\n[no](link.md) `model/none.py`\n```\n",
        encoding="utf-8",
    )
    assert dead_links(document) == ["b.md", "#two"]
    assert dead_paths(document) == ["model/none.py", "gone.py"]


def test_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 160


# ------------------------------------------------------------------------------------------------ Python


def examples(document: str) -> list[str]:
    """The Python blocks of a document."""
    return re.findall(r"^```python\n(.*?)^```$", text_of(ROOT / document), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, like the root of a clone to which `python -m dataset.mini` has written."""
    write_reason_seg(tmp_path / "data/mini", 0, {"val": 13})
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_of_the_readme_prints_what_it_says(clone: Path) -> None:
    (example,) = examples("README.md")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, {})
    (said,) = re.findall(r"^# (.*)$", example, flags=re.MULTILINE)
    number = r"\d+\.\d*"
    text, found = re.sub(number, "N", said), re.sub(number, "N", printed.getvalue().strip())
    assert re.sub(r"\s+", "", found) == re.sub(r"\s+", "", text)
    ours, theirs = ([float(value) for value in re.findall(number, line)] for line in (printed.getvalue(), said))
    assert ours[:4] == pytest.approx(theirs[:4], abs=2)  # pixels
    assert ours[4:] == pytest.approx(theirs[4:], abs=0.01)


def test_the_example_of_own_data_makes_a_data_set(clone: Path, capsys: pytest.CaptureFixture) -> None:
    from dataset.check import main

    (example,) = examples("docs/data.md")
    exec(example, {})
    assert main(["--own_data", "mydata"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("own ")]
    assert [row[1:] for row in rows] == [["mydata", "train", "1", "2", "1", "1"], ["mydata", "val", "1", "1", "1", "0"]]


def test_the_example_of_sasp_gives_prompts_to_sam() -> None:
    """With stand-in states: 24 x 24 image tokens, two [SEG], and SAM's prompt encoder with random weights."""
    (example,) = [example for example in examples("docs/checkpoints.md") if "select_points" in example]
    generator = torch.Generator().manual_seed(0)
    names = {
        "image_states": torch.randn(24 * 24, 32, generator=generator),
        "seg_states": torch.randn(2, 32, generator=generator),
        "projected_seg": torch.randn(2, 256, generator=generator),
        "height": 480, "width": 640, "sam_height": 768, "sam_width": 1024,
        "sam": torch.nn.Module(),
    }  # fmt: skip
    names["sam"].prompt_encoder = PromptEncoder(256, (64, 64), (1024, 1024), 16)
    exec(example, names)
    assert names["points"].shape == (2, 30, 2)
    torch.testing.assert_close(names["points"], names["found"].points * 1.6)
    assert names["sparse"].shape == (2, 32, 256)  # 30 points, SAM's padding point, [SEG]
    torch.testing.assert_close(names["sparse"][:, -1], names["projected_seg"])
    assert names["dense"].shape == (2, 256, 64, 64)
