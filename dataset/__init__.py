"""Data sets: the only registry of their names. `build_train` mixes what is learnt from, `build_eval` opens what is measured."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from .mixture import Drawable, Members, Mixture
from .own import FORMS, OwnEvaluation, OwnTraining
from .reason_seg import ReasonEvaluation, ReasonTraining
from .refer_api import SPLIT_BY
from .refer_seg import ReferEvaluation, ReferTraining
from .sem_seg import SemSegTraining
from .vqa import VqaTraining

TRAIN_SETS = ("sem_seg", "refer_seg", "correct_refer_seg", "vqa", "neg_refer_seg", "reason_seg", "own")
EVAL_SETS = ("ReasonSeg", *SPLIT_BY)


def build_train(
    dataset: Sequence[str],
    rates: Sequence[float],
    dataset_dir: str | Path,
    *,
    seed: int = 42,
    num_classes_per_sample: int = 1,
    sem_seg_data: str = "ade20k||cocostuff||pascal_part||paco_lvis||mapillary",
    refer_seg_data: str = "refclef||refcoco||refcoco+||refcocog",
    neg_refer_seg_data: str = "R-refcocog||R-refcoco||R-refcoco+",
    correct_refer_seg_data: str = "fprefcocog||fprefcoco||fprefcoco+",
    vqa_data: str = "llava_instruct_150k",
    reason_seg_data: str = "ReasonSeg|train",
    reason_seg_ignore: str = "background",
    own_data: str = "",
    allow_missing: bool = False,
) -> Mixture:
    """The training mixture of named families and their rates; `a||b` names the members of a family (§3, flags).

    Args:
        reason_seg_ignore: ReasonSeg's ignored regions train as `background`, as in the original, or are left out: `ignored`.
        own_data: paths of own data (`dataset.own`), joined by `||`; they are the family `own`.
        allow_missing: what is not on disk is named in a warning and left out; the rest keeps its proportions.

    Raises:
        ValueError: an unknown family, an empty member, as many rates as families are not given, `own` without `own_data` or
            the reverse, or a member is broken; the message names it, or its file.
        FileNotFoundError: members are not on disk; the message names all of them, and their files.
    """
    if len(dataset) != len(rates):
        raise ValueError(f"{len(dataset)} data sets ({', '.join(dataset)}) but {len(rates)} sample rates ({list(rates)})")
    unknown = [name for name in dataset if name not in TRAIN_SETS]
    if unknown:
        raise ValueError(f"no training set {unknown[0]!r}; there are {', '.join(TRAIN_SETS)}")
    if ("own" in dataset) != bool(own_data):
        raise ValueError(f"the data set 'own' and --own_data PATH need each other: found {', '.join(dataset)} and {own_data!r}")
    k = num_classes_per_sample
    members: dict[str, list[str]] = {
        "sem_seg": sem_seg_data.split("||"),
        "refer_seg": refer_seg_data.split("||"),
        "neg_refer_seg": neg_refer_seg_data.split("||"),
        "correct_refer_seg": correct_refer_seg_data.split("||"),
        "vqa": [vqa_data],
        "reason_seg": [reason_seg_data],
        "own": own_data.split("||"),
    }
    for name in dataset:
        if not all(map(str.strip, members[name])):
            raise ValueError(f"the data set {name!r} has an empty member: found {'||'.join(members[name])!r}, wanted NAME||NAME")
    sets, kept, missing = [], {}, []
    for name, rate in zip(dataset, rates, strict=True):
        there = []
        for member in members[name]:
            try:
                there.append(_open_member(name, member, dataset_dir, k, reason_seg_ignore))
            except FileNotFoundError as error:
                missing.append(f"{name}, {member}: {error}")
        if there:
            sets.append(Members(there))
            kept[name] = rate
    if missing:
        told = "\n  ".join(missing)
        if not allow_missing or not sets:
            hint = "" if sets else "; nothing of it is left to train on"
            raise FileNotFoundError(f"not on disk (--allow_missing trains without){hint}:\n  {told}")
        logging.getLogger(__name__).warning("trains without what is not on disk:\n  %s", told)
    return Mixture(sets, list(kept.values()), seed, list(kept))


def _open_member(family: str, member: str, dataset_dir: str | Path, k: int, reason_seg_ignore: str) -> Drawable:
    if family == "sem_seg":
        return SemSegTraining(dataset_dir, member, k)
    if family == "reason_seg":
        return ReasonTraining(dataset_dir, member, k, reason_seg_ignore)
    if family == "own":
        return OwnTraining(member, k)
    if family == "vqa":
        return VqaTraining(dataset_dir, member)
    return ReferTraining(dataset_dir, member, k)


def build_eval(
    name: str,
    split: str,
    dataset_dir: str | Path,
    *,
    protocol: str = "forced",
    templates: str = "fixed",
    seed: int = 0,
) -> ReasonEvaluation | ReferEvaluation | OwnEvaluation:
    """A split to measure: one item a picture with all its expressions (§5).

    Args:
        name: one of `EVAL_SETS`, or else the path of own data (`dataset.own`).
        protocol: `forced` puts the answer with its [SEG] into the conversation, `generate` leaves it to the model.
        templates: `fixed` sentences, or `random` ones with a seed, as the original drew for the refer family.

    Raises:
        ValueError: an unknown name, protocol or kind of templates. FileNotFoundError: it is not on disk.
    """
    if protocol not in ("forced", "generate"):
        raise ValueError(f"protocol must be 'forced' or 'generate', found {protocol!r}")
    if templates not in ("fixed", "random"):
        raise ValueError(f"templates must be 'fixed' or 'random', found {templates!r}")
    if name == "ReasonSeg":
        return ReasonEvaluation(dataset_dir, split, protocol, templates == "random", seed)
    if name in SPLIT_BY:
        return ReferEvaluation(dataset_dir, name, split, protocol, templates == "random", seed)
    if name and os.path.exists(os.path.expanduser(name)):  # expanduser leaves ~ of an unknown user as it is
        return OwnEvaluation(name, split, protocol, templates == "random", seed)
    raise ValueError(
        f"no evaluation set {name!r}: it is neither one of {', '.join(EVAL_SETS)}, nor the path of own data ({FORMS})"
    )
