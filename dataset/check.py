"""`python -m dataset.check --dataset_dir D`: what is there, what is missing, what is broken, and what would train.

    python -m dataset.check --own_data PATH         own data (dataset/own.py) instead, pictures and all

Counts pictures and questions of every set and split, and looks at every annotation; with --pictures it decodes every picture
too. Ends with 0 if all that was asked for is whole, with 1 if something is missing, with 2 if something is broken, or a flag
is wrong. What is only odd (a file without shapes has an empty target, as two of ReasonSeg's test files have) or of another kind
(dialogues without a picture, which training leaves out) is noted, and is no fault.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.cli import add_image_flags, one_line, plain_errors
from utils.image import read_image

from .own import SHOWN as OWN_SHOWN
from .own import OwnDataError, open_splits, question_mask
from .reason_seg import Annotation, draw_mask, list_files, read_annotation
from .refer_api import SPLIT_BY, Refer
from .sem_seg import SOURCES, Parts
from .vqa import find_files, read_dialogues

SHOWN = 5
"""So many faults of one set are told, the rest is counted."""
FAMILIES = {
    "sem_seg": tuple(SOURCES),
    "refer_seg": ("refclef", "refcoco", "refcoco+", "refcocog"),
    "neg_refer_seg": ("R-refcoco", "R-refcoco+", "R-refcocog"),
    "correct_refer_seg": ("fprefcoco", "fprefcoco+", "fprefcocog"),
    "vqa": ("llava_instruct_150k",),
    "reason_seg": ("ReasonSeg",),
}
REASON_SPLITS = ("train", "val", "test")


@dataclass
class Split:
    """Counts of one split; `positive` and `negative` add up to its questions (a dialogue counts as one, of neither kind)."""

    name: str
    pictures: int = 0
    questions: int = 0
    positive: int = 0
    negative: int = 0


@dataclass
class Report:
    """What was found of one set."""

    family: str
    name: str
    splits: list[Split] = field(default_factory=list)
    missing: str = ""
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is used as it is, and may not be meant so."""


def check(family: str, name: str, dataset_dir: Path, pictures: bool = False) -> Report:
    """Looks at every annotation of one set, and at every picture if `pictures`."""
    report = Report(family, name)
    look = {"sem_seg": _sem_seg, "reason_seg": _reason_seg, "vqa": _vqa, "own": _own}.get(family, _refer)
    try:
        for path, size in look(report, dataset_dir):
            try:
                if path.is_file() and not pictures:
                    continue
                found = read_image(path).shape[:2]
            except (OSError, ValueError) as error:
                report.faults.append(one_line(error))
                continue
            if size not in (None, found):
                has, wants = (" x ".join(map(str, sides)) for sides in (found, size))
                report.faults.append(f"{path} has {has} pixels (turned, if its EXIF data say so), its annotations {wants}")
    except FileNotFoundError as error:
        report.missing = str(error)
    except OwnDataError as error:
        report.faults += error.faults
    except (OSError, ValueError) as error:
        report.faults.append(one_line(error))
    return report


Picture = tuple[Path, tuple[int, int] | None]
"""A file that must be there, and the size (H, W) that its annotations are for, where they say so."""


def _refer(report: Report, root: Path) -> Iterator[Picture]:
    refer = Refer(root, report.name)
    empty = set()
    # Where no ref has a split, asking for one tells why.
    for name in sorted({str(ref.get("split", "")) for ref in refer.refs if isinstance(ref, dict)}) or ["train"]:
        split = Split(name)
        report.splits.append(split)
        for picture in refer.of_split(name):
            split.pictures += 1
            yield refer.image_dir / picture.file_name, (picture.height, picture.width)
            for sentence in picture.sentences:
                split.questions += 1
                split.positive += sentence["exists"]
                split.negative += not sentence["exists"]
                if sentence["exists"]:
                    try:
                        if not refer.mask(sentence["ann_id"], picture.height, picture.width).any():
                            empty.add(f"{refer.instances_file}, annotation {sentence['ann_id']}: is asked for, and empty")
                    except ValueError as error:
                        report.faults.append(str(error))
                elif report.name.startswith("fp") and not sentence["gt_sent"]:
                    report.faults.append(f"{refer.refs_file}: sent_id {sentence['sent_id']} is false and has no gt_sent")
    report.notes += sorted(empty)


def _reason_seg(report: Report, root: Path) -> Iterator[Picture]:
    absent = []
    for name in REASON_SPLITS:
        try:
            files = list_files(root, [name])
        except FileNotFoundError as error:
            absent.append(str(error))
            continue
        split = Split(name)
        report.splits.append(split)
        for picture, file in files:
            split.pictures += 1
            yield picture, None
            try:
                note = read_annotation(file, any_shape=False)
            except (OSError, ValueError) as error:
                report.faults.append(one_line(error))
                continue
            split.positive += len(note.texts)
            split.negative += len(note.false_premises)
            report.notes += [f"{file}: {words}" for words in _odd_shapes(note, picture)]
        split.questions = split.positive + split.negative
    if not report.splits:
        raise FileNotFoundError(absent[0])


def _odd_shapes(note: Annotation, picture: Path) -> Iterator[str]:
    """What may not be meant so in a ReasonSeg file."""
    if not note.shapes:
        yield "it has no shapes, so its target is empty"
    for shape in note.shapes:
        if len(shape["points"]) < 3:
            yield f"a shape of {len(shape['points'])} points is drawn as a {'dot' if len(shape['points']) == 1 else 'line'}"
        if not any(word in shape["label"].lower() for word in ("target", "ignore")):
            yield f"a shape with the label {shape['label']!r} counts as the target"
    if note.shapes and picture.is_file():
        try:
            size = read_image(picture).shape[:2]
        except (OSError, ValueError):
            return  # --pictures tells
        if not (draw_mask(note.shapes, *size) == 1).any():
            yield "its shapes cover nothing of the picture, so its target is empty"


def _sem_seg(report: Report, root: Path) -> Iterator[Picture]:
    source = SOURCES[report.name](root)
    split = Split("train")
    report.splits.append(split)
    rng = np.random.default_rng(0)
    for index in range(len(source)):
        split.pictures += 1
        try:
            content = source.content(index, rng)
        except (OSError, ValueError) as error:
            report.faults.append(one_line(error))
            continue
        split.positive += len(content.present)
        split.questions += len(content.present)
        for _, mask in content.present if isinstance(source, Parts) else ():
            try:
                mask()
            except ValueError as error:
                report.faults.append(f"{one_line(error)}; training draws another image instead")
        yield content.path, content.size


def _vqa(report: Report, root: Path) -> Iterator[Picture]:
    file, image_dir = find_files(root, report.name)
    found = read_dialogues(file)
    report.faults += [f"{file}, {fault}; training leaves it out" for fault in found.broken]
    report.notes += [f"{file}, {note}; training leaves it out" for note in found.foreign]
    split = Split("train")
    report.splits.append(split)
    for dialogue in found.usable:
        split.pictures += 1
        split.questions += 1
        yield image_dir / dialogue.image, None


def _own(report: Report, _: Path) -> Iterator[Picture]:
    """Decodes every picture: its size must be that of its masks."""
    for name, opened in open_splits(report.name).items():
        split = Split(name)
        report.splits.append(split)
        try:
            data = opened()
        except OwnDataError as error:  # the other splits may be whole
            report.faults += error.faults
            continue
        for picture in data.pictures:
            split.pictures += 1
            try:
                size = read_image(picture.path).shape[:2]
            except (OSError, ValueError) as error:
                report.faults.append(str(error))
                continue
            for asked in picture.questions:
                split.questions += 1
                split.positive += asked.exists
                split.negative += not asked.exists
                try:
                    if asked.exists and not (question_mask(picture, asked, *size) == 1).any():
                        report.faults.append(f"{asked.where}: its shapes cover nothing of the picture")
                except ValueError as error:
                    report.faults.append(str(error))
    yield from ()


# ------------------------------------------------------------------------------------------------ the command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dataset.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset_dir", type=Path, default=Path("./data"), help="as train_read.py takes it")
    known = [*FAMILIES, *(name for names in FAMILIES.values() for name in names)]
    parser.add_argument(
        "--dataset", help="families or sets, joined by ||; unless given, all that is there: " + ", ".join(known)
    )
    parser.add_argument("--own_data", help="paths of own data, joined by ||; without --dataset nothing else is looked at")
    parser.add_argument("--pictures", action=argparse.BooleanOptionalAction, default=False, help="decode every picture")
    add_image_flags(parser)
    return parser


def wanted(dataset: str | None) -> list[tuple[str, str]]:
    """(family, set) pairs of the flag; all of them without it.

    Raises:
        ValueError: an unknown name.
    """
    everything = [(family, name) for family, names in FAMILIES.items() for name in names]
    if dataset is None:
        return everything
    chosen = []
    for word in dataset.split("||"):
        found = [pair for pair in everything if word in pair]
        if not found:
            raise ValueError(f"no data set {word!r}; there are {', '.join([*FAMILIES, *SPLIT_BY, *SOURCES])}")
        chosen += found
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status. What the flags name and is not there ends it with status 2 and one line."""
    options = build_parser().parse_args(argv)
    with plain_errors("dataset.check"):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    own = [] if options.own_data is None else options.own_data.split("||")
    if not all(map(str.strip, own)):
        raise ValueError(f"--own_data {options.own_data!r}: a path is empty; give PATH, or PATH||PATH")
    pairs = [] if own and options.dataset is None else wanted(options.dataset)
    if pairs and not options.dataset_dir.is_dir():
        what = "is no folder" if options.dataset_dir.exists() else "does not exist"
        raise ValueError(f"--dataset_dir {options.dataset_dir} {what}: it is the folder of reason_seg, refer_seg, coco, ...")
    pairs += [("own", path) for path in own]
    reports = [check(family, name, options.dataset_dir, options.pictures) for family, name in pairs]
    width = max([21, *(len(name) + 2 for _, name in pairs)])
    print(f"{'family':<19}{'set':<{width}}{'split':<8}{'pictures':>9}{'questions':>11}{'positive':>10}{'negative':>10}")
    for report in reports:
        for split in report.splits:
            counts = f"{split.pictures:>9}{split.questions:>11}{split.positive:>10}{split.negative:>10}"
            print(f"{report.family:<19}{report.name:<{width}}{split.name:<8}{counts}")
    for report in reports:
        shown = OWN_SHOWN if report.family == "own" else SHOWN  # own data are there to be mended
        for fault in report.faults[:shown]:
            print(f"broken   {report.name}: {fault}")
        if len(report.faults) > shown:
            print(f"broken   {report.name}: and {len(report.faults) - shown} more")
        for note in report.notes[:shown]:
            print(f"note     {report.name}: {note}")
        if len(report.notes) > shown:
            print(f"note     {report.name}: and {len(report.notes) - shown} more")
    for report in reports:
        if report.missing:
            print(f"missing  {report.name}: {report.missing}")
    whole = [r for r in reports if not r.missing and not r.faults and any(s.name == "train" for s in r.splits)]
    for family in (*FAMILIES, "own"):
        names = [report.name for report in whole if report.family == family]
        if names:
            print(f"trains   {family}: {', '.join(names)}")
    if not whole:
        print("trains   nothing")
    # Without --dataset everything is looked for, and that some of it is missing is no fault.
    missing = any(report.missing for report in reports) and (
        options.dataset is not None or options.own_data is not None or not whole
    )
    return 2 if any(report.faults for report in reports) else int(missing)


if __name__ == "__main__":
    sys.exit(main())
