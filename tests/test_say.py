"""Say: what its scores are worth, and that they are sacrebleu's."""

import math
import random
from importlib.metadata import version

from dataset import templates
from utils.say import say_score, signature

# False premise, what is there instead: one word changed, as RefCOCO's are.
ONE_WORD = (
    ("woman in blue shirt on left", "man in blue shirt on left"),
    ("red car behind the bus", "white car behind the bus"),
    ("dog lying on the couch", "cat lying on the couch"),
    ("bowl of soup in front", "bowl of rice in front"),
    ("man holding a tennis racket", "man holding a baseball bat"),
)


def chrf(answer: str, reference: str) -> float:
    """chrF2 from its definition: mean precision and recall of character 1- to 6-grams, F with beta 2."""
    answer, reference = ("".join(text.lower().split()) for text in (answer, reference))
    precisions, recalls = [], []
    for n in range(1, 7):
        ours, theirs = ([text[i : i + n] for i in range(len(text) - n + 1)] for text in (answer, reference))
        both = sum(min(ours.count(gram), theirs.count(gram)) for gram in set(ours))
        if ours and theirs:
            precisions.append(both / len(ours))
            recalls.append(both / len(theirs))
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * p * r / (4 * p + r) if p + r else 0.0


def test_it_is_chrf2():
    pairs = [
        ("There is no dog here, but I see a Cat.", "a cat on the couch"),
        ("Nothing in this picture is fit for that.", "I see no boot here, so nothing answers that."),
        ("quite wrong", "zzz xxx"),
    ]
    for answer, reference in pairs:
        assert abs(say_score(answer, reference) - chrf(answer, reference)) < 1e-9
    assert say_score("A blue cup.", "a blue cup.") == 1


def test_the_expression_asked_is_taken_out_once():
    assert say_score("No Red  Cup, but a red bag", "a red bag", asked="red cup") == say_score("No , but a red bag", "a red bag")
    twice, once = "No red cup. A red cup on the left", "No . A red cup on the left"
    assert say_score(twice, "A red cup on the left", asked="red cup") == say_score(once, "A on the left")
    # Whole words only, in the answer and in the reference alike: what is equal stays equal.
    assert say_score("What you indicate is a dog", "a dog", asked="cat") == say_score("What you indicate is a dog", "a dog")
    assert say_score("I see no boot here", "I see no boot here", asked="boot") == 1
    assert say_score("the cup", "the cup", asked="the cup") == 1


def test_seg_is_not_said_and_nothing_is_no_reference():
    assert say_score("a blue cup [SEG].", "a blue cup.") == 1
    assert say_score("", "a blue cup") == 0
    assert math.isnan(say_score("a blue cup", " "))


def test_right_corrections_stand_out():
    """The claim of the docstring: of every pair the right correction is above the wrong one and the bare denial."""
    rng = random.Random(0)
    right, wrong, denied = [], [], []
    for _ in range(60):
        k = rng.randrange(len(ONE_WORD))
        asked, truth = ONE_WORD[k]
        other = ONE_WORD[k - 1][1]
        for scores, pool, name in (
            (right, templates.CORRECT_ANSWER, truth),
            (wrong, templates.CORRECT_ANSWER, other),
            (denied, templates.NEG_ANSWER, ""),
        ):
            answer = rng.choice(pool).format(class_name=asked, gt_name=name)
            scores.append(say_score(answer, truth, asked=asked))
    assert min(right) > max(*wrong, *denied)
    means = [sum(scores) / 60 for scores in (right, wrong, denied)]
    assert 0.7 < means[0] < 0.8 and 0.05 < means[1] < 0.2 and 0.05 < means[2] < 0.2


def test_the_signature_names_setting_and_version():
    assert signature() == f"chrF2|asked:out|nrefs:1|case:lc|eff:yes|nc:6|nw:0|space:no|version:{version('sacrebleu')}"
