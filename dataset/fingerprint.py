"""What training sets hold, as one digest a set: by it a resumed run notices that its data changed.

Annotation files count with their content; images and masks with name, size and time of change, since reading all of them would
take longer than much training does. Where the data lies does not count.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.content import content_name, file_name

from .mixture import Drawable, Mixture
from .own import OwnTraining
from .reason_seg import ReasonTraining
from .refer_seg import ReferTraining
from .sem_seg import LabelMaps, SemSegTraining
from .vqa import VqaTraining

TEXTS = (".json", ".jsonl", ".csv", ".p")


def fingerprint(mixture: Mixture) -> dict[str, str]:
    """Digest of each set of a mixture, by its name."""
    return {name: _digest(drawn) for name, drawn in zip(mixture.names, mixture.sets, strict=True)}


def _digest(drawn: Drawable) -> str:
    found: list[Any] = []
    for member in drawn.members:
        found.append([type(member).__name__, len(member)])
        for file in dict.fromkeys(files_of(member)):  # one that is missing is a broken sample, which training counts
            found.append([file.name, file] if file.suffix in TEXTS else file_name(file))
    return content_name(found)[:16]


def files_of(member: Drawable) -> Iterator[Path]:
    """Annotation files, images and masks that a training set reads, always in the same order."""
    if isinstance(member, ReasonTraining):
        yield from _flat(member.files)
    elif isinstance(member, ReferTraining):
        yield from (member.refer.refs_file, member.refer.instances_file)
        yield from (member.refer.image_dir / image.file_name for image in member.pictures)
    elif isinstance(member, VqaTraining):
        yield member.file
        yield from (member.image_dir / dialogue.image for dialogue in member.dialogues)
    elif isinstance(member, SemSegTraining) and isinstance(member.source, LabelMaps):
        yield from _flat(member.source.pairs)
    elif isinstance(member, SemSegTraining):
        yield member.source.file
        yield from (member.source.image_dir / image["file_name"].replace("\\", "/") for image in member.source.images)
    elif isinstance(member, OwnTraining):
        root = Path(os.path.expanduser(member.name))
        yield from sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
        for picture in member.data.pictures:  # which may lie elsewhere
            yield picture.path
            for question in picture.questions:
                yield from (given for given in getattr(question.mask, "args", ()) if isinstance(given, Path))


def _flat(pairs: Iterable[Iterable[Path]]) -> Iterator[Path]:
    return (file for pair in pairs for file in pair)
