"""Data sets: the only registry of their names. `build_train` mixes what is learnt from, `build_eval` opens what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .mixture import Mixture
from .reason_seg import ReasonEvaluation, ReasonTraining
from .refer_api import SPLIT_BY
from .refer_seg import ReferEvaluation, ReferTraining
from .vqa import VqaTraining

TRAIN_SETS = ("refer_seg", "correct_refer_seg", "neg_refer_seg", "reason_seg", "vqa")
EVAL_SETS = ("ReasonSeg", *SPLIT_BY)


def build_train(
    dataset: Sequence[str],
    rates: Sequence[float],
    dataset_dir: str | Path,
    *,
    seed: int = 42,
    num_classes_per_sample: int = 1,
    refer_seg_data: str = "refclef||refcoco||refcoco+||refcocog",
    neg_refer_seg_data: str = "R-refcocog||R-refcoco||R-refcoco+",
    correct_refer_seg_data: str = "fprefcocog||fprefcoco||fprefcoco+",
    reason_seg_data: str = "ReasonSeg|train",
    vqa_data: str = "llava_instruct_150k",
    **unused: str,
) -> Mixture:
    """The training mixture of named families and their rates; `a||b` names the members of a family (§3, flags).

    Raises:
        ValueError: an unknown family, or as many rates as families are not given.
        FileNotFoundError: a member is not on disk; the message names the file.
    """
    if len(dataset) != len(rates):
        raise ValueError(f"{len(dataset)} data sets ({', '.join(dataset)}) but {len(rates)} sample rates ({list(rates)})")
    members = {
        "refer_seg": refer_seg_data,
        "neg_refer_seg": neg_refer_seg_data,
        "correct_refer_seg": correct_refer_seg_data,
    }
    sets = []
    for name in dataset:
        if name in members:
            sets.append(ReferTraining(dataset_dir, members[name].split("||"), num_classes_per_sample))
        elif name == "reason_seg":
            sets.append(ReasonTraining(dataset_dir, reason_seg_data, num_classes_per_sample))
        elif name == "vqa":
            sets.append(VqaTraining(dataset_dir, vqa_data))
        else:
            raise ValueError(f"no training set {name!r}; there are {', '.join(TRAIN_SETS)}")
    return Mixture(sets, rates, seed)


def build_eval(
    name: str,
    split: str,
    dataset_dir: str | Path,
    *,
    protocol: str = "forced",
    templates: str = "fixed",
    seed: int = 0,
) -> ReasonEvaluation | ReferEvaluation:
    """A split to measure: one item a picture with all its expressions (§5).

    Args:
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
    if name not in SPLIT_BY:
        raise ValueError(f"no evaluation set {name!r}; there are {', '.join(EVAL_SETS)}")
    return ReferEvaluation(dataset_dir, name, split, protocol, templates == "random", seed)
