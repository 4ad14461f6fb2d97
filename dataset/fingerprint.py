"""What training sets hold, as one digest a set: by it a resumed run notices that its data changed.

Annotation files count with their content; images and masks with name, size and time of change, since reading all of them would
take longer than much training does. Where the data lies does not count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

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
    digest = hashlib.sha256()
    for member in drawn.members:
        digest.update(f"{type(member).__name__} {len(member)}\n".encode())
        for file in dict.fromkeys(files_of(member)):
            digest.update(f"{file.name} {_facts(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _facts(file: Path) -> str:
    try:
        if file.suffix in TEXTS:
            content = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    content.update(block)
            return content.hexdigest()
        stat = file.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    except OSError:  # a broken sample, which training counts
        return "missing"


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
