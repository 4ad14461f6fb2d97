"""Say: how close what the model says about a false premise comes to what it should say, with sacrebleu's chrF.

    say_score("There is no red cup here, but I see a blue cup.", "a blue cup", asked="red cup")     0.55, of [0, 1]
    signature()                                                   what was computed, for the file of results

SESAME named See, Say and Segment, but its Say was never released and READ's test has none: these numbers are ours, and stand
beside no published ones. What the answer should say is `gt_sent` in FP-RefCOCO, a bare expression of what is there instead
("a blue cup"), and in ReasonSeg a whole annotated sentence, the answer of `false_premise_QA`.

chrF2 (Popović 2015) is an F-score of character 1- to 6-grams where recall weighs twice; lower-cased, one sentence at a time.
Two things are taken out before: `[SEG]`, and once the expression that was asked. Nearly every answer repeats it ("There is no
red cup"), and a false premise differs from the truth by a word: without this, a bare denial scores almost as high as a right
correction (the last column), and no setting of chrF mends that (with all weight on recall still 0.65 against 1.00).

Means, and in brackets where the middle 80 % lie, of 600 answers each from `dataset/templates.py`: to all false premises of
val and test of our three FP-RefCOCO sets, and to 14 of the kind of RefCOCO's, one word changed ("woman in blue shirt on left"
for "man in blue shirt on left").

    answer                              our sets               one word changed       the same, asked not taken out
    right correction (CORRECT_ANSWER)   0.60 (0.45 to 0.76)    0.75 (0.70 to 0.81)    0.65 (0.60 to 0.69)
    wrong correction, another's truth   0.14 (0.08 to 0.23)    0.14 (0.09 to 0.18)    0.43 (0.30 to 0.54)
    bare denial (NEG_ANSWER)            0.10 (0.06 to 0.14)    0.11 (0.07 to 0.16)    0.52 (0.35 to 0.65)

So 1 is out of reach where the reference is a bare expression: the words around it cost precision. 0.6 and more means
corrected as annotated, 0.1 denied and no more. A right correction in other words ("the guy" for "man") is scored low.

Against the whole sentences of ReasonSeg chrF sees wording and hardly what is meant. Of our answers there, those which deny the
right thing in other words have 0.36, those which deny a wrong thing 0.37, since they may share the wording. Use it there to
compare models that were trained on the same answers, and for nothing else.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any


def say_score(answer: str, reference: str, asked: str = "") -> float:
    """chrF2 of an answer in [0, 1]; see above for what it is worth.

    Args:
        answer: what the model said, with or without `[SEG]`.
        reference: what it should have said. NaN is returned if this is blank, since there is nothing to compare with.
        asked: the bare expression; its first occurrence is no part of the comparison, in the answer or in the reference.
    """
    if not reference.strip():
        return math.nan
    answer = answer.replace("[SEG]", " ")
    left = _without(reference, asked)
    if left.strip():  # else the reference is the expression itself, and taking it out would leave nothing
        answer, reference = _without(answer, asked), left
    return _chrf().sentence_score(answer, [reference]).score / 100


def signature() -> str:
    """What `say_score` computes, in sacrebleu's notation, and the version of sacrebleu."""
    return f"chrF2|asked:out|{_chrf().get_signature()}"


def _without(text: str, asked: str) -> str:
    """The text without the first occurrence of whole words."""
    words = r"\s+".join(re.escape(word) for word in asked.split())
    return re.sub(rf"(?<!\w){words}(?!\w)", " ", text, count=1, flags=re.IGNORECASE) if words else text


@lru_cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF  # here, not above: most evaluations have no false premises

    metric = CHRF(lowercase=True)
    metric.sentence_score("a", ["a"])  # its signature names the number of references, known once it was used
    return metric
