"""Readers of ReasonSeg and the refer family: the original's trees, the mini world's, broken ones, and the mixture."""

import hashlib
import json
import pickle
import re

import numpy as np
import pytest
from golden_dir import golden_dirs

from dataset import build_eval, build_train, templates
from dataset.mini.write import write_all
from dataset.mixture import Mixture
from dataset.reason_seg import draw_mask, read_annotation
from dataset.refer_api import SPLIT_BY, Refer, read_pickle
from dataset.refer_seg import answer

E2E = [f / "e2e" for f in golden_dirs() if (f / "e2e/dataset").is_dir()]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini")
    write_all(root, seed=5, train=6, val=4, test=2)
    return root


# ------------------------------------------------------------------------------------------------ the original's trees


@pytest.mark.parametrize("folder", [f for f in E2E if (f / "reasonseg.npz").is_file()], ids=str)
def test_reason_seg_masks_and_prompts(folder):
    arrays = np.load(folder / "reasonseg.npz")
    table = json.loads((folder / "reasonseg.json").read_text())
    data = build_eval("ReasonSeg", "val", folder / "dataset", protocol="forced")
    assert len(data) == len(table["images"])
    for i, entry in enumerate(table["images"]):
        sample = data[i]
        assert sample.image_path.endswith(entry["path"].removeprefix("dataset/"))
        assert np.array_equal(sample.masks, arrays[f"im{i}_gt"])
        (question, reply), = sample.conversations[0]
        assert f"\n{question} ASSISTANT: {reply}</s>" in entry["conversation"][0]


@pytest.mark.parametrize("folder", [f for f in E2E if (f / "expected_fprefcoco").is_dir()], ids=str)
def test_fprefcoco_masks_order_and_presence(folder):
    recorded = json.loads(next((folder / "expected_fprefcoco").glob("preds_*.json")).read_text())
    data = build_eval("fprefcoco", "val", folder / "dataset", protocol="generate")
    assert len(data) == len(recorded)
    for sample, (path, entry) in zip((data[i] for i in range(len(data))), recorded.items(), strict=True):
        assert sample.image_path.endswith(path.removeprefix("dataset/"))
        assert sample.exists == [bool(value) for value in entry["gt_exists"]]
        assert sample.meta["ref_ids"] == np.ravel(entry["ref_ids"]).tolist()
        masks = np.load(folder / "expected_fprefcoco/segmentation_mask" / entry["segmentation_path"].split("/")[-1])
        assert np.array_equal(sample.masks, np.minimum(masks["gt"], 1))
        assert all(reply is None for ((_, reply),) in sample.conversations)


# ------------------------------------------------------------------------------------------------ mini, in the same formats


def test_training_samples_fit_their_answers(mini):
    mixture = build_train(
        ["refer_seg", "correct_refer_seg", "reason_seg"], [1, 1, 1], mini, refer_seg_data="refcoco",
        correct_refer_seg_data="fprefcoco", num_classes_per_sample=3,
    )  # fmt: skip
    kinds = set()
    for index in range(60):
        sample = mixture.sample(0, index)
        segs = sum(reply.count("[SEG]") for turns in sample.conversations for _, reply in turns)
        assert segs == len(sample.masks) == sum(sample.exists)
        assert sample.masks.shape[1:] == sample.image.shape[:2] and set(np.unique(sample.masks)) <= {0, 1}
        assert all(mask.any() for mask in sample.masks)
        kinds.add((sample.meta["dataset"], all(sample.exists)))
    assert {("refcoco", True), ("fprefcoco", False), ("ReasonSeg", True), ("ReasonSeg", False)} <= kinds


def test_evaluation_is_fixed_and_complete(mini):
    for name, split in (("ReasonSeg", "test"), ("refcoco", "val"), ("refcoco", "testA"), ("fprefcoco", "val")):
        forced, free = (build_eval(name, split, mini, protocol=p) for p in ("forced", "generate"))
        for i in range(len(forced)):
            a, b = forced[i], free[i]
            assert [t[0][0] for t in a.conversations] == [t[0][0] for t in b.conversations][: len(a.conversations)]
            assert all(t[0][1] == templates.EVAL_ANSWER for t in a.conversations)
            assert len(a.masks) == len(a.conversations) == len(a.exists) == len(a.questions)
            for mask, exists in zip(a.masks, a.exists, strict=True):
                assert (mask == 1).any() == exists
    asked = build_eval("refcoco", "val", mini, templates="random", seed=1)
    again = build_eval("refcoco", "val", mini, templates="random", seed=1)
    assert asked[0].conversations == again[0].conversations != build_eval("refcoco", "val", mini)[0].conversations


def test_an_expression_is_asked_with_its_blanks_and_answered_without(mini, tmp_path):
    """As the original does, in training and in evaluation; only its letters become small."""
    from shutil import copytree

    copy = copytree(mini, tmp_path / "mini")
    for file in (copy / "refer_seg/refcoco").glob("refs*.p"):
        refs = pickle.loads(file.read_bytes())
        for ref in refs:
            for sentence in ref["sentences"]:
                sentence["sent"] = "  The Red  Bag "
        file.write_bytes(pickle.dumps(refs))
    asked, answers = "  the red  bag ", "the red  bag"
    questions = {text.format(class_name=asked) for text in templates.SHORT_QUESTION}
    replies = {text.format(class_name=answers) for text in templates.SHORT_ANSWER}
    mixture = build_train(["refer_seg"], [1], copy, refer_seg_data="refcoco")
    turns = [mixture.sample(0, i).conversations[0][0] for i in range(20)]
    turns += [turn for (turn,) in build_eval("refcoco", "val", copy, templates="random")[0].conversations]
    assert {question for question, _ in turns} <= questions and {reply for _, reply in turns} <= replies
    fixed = build_eval("refcoco", "val", copy, protocol="generate")[0]
    assert fixed.conversations[0] == [(templates.EVAL_SHORT_QUESTION.format(class_name=asked), None)]


def test_texts_of_python_2_are_read(tmp_path):
    """Its pickles hold bytes: as Latin-1, as before, UTF-8 became nonsense."""
    (tmp_path / "refs.p").write_bytes(b"S'caf\\xc3\\xa9'\n.")
    assert read_pickle(tmp_path / "refs.p") == "caf\u00e9"


def test_mini_is_written_the_same_twice(mini, tmp_path):
    write_all(tmp_path, seed=5, train=6, val=4, test=2)
    files = sorted(p.relative_to(mini) for p in mini.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert all((mini / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)


def test_ignore_regions_as_the_original_trains_them_or_really(mini):
    from dataset.reason_seg import ReasonTraining

    shapes = [{"label": "target", "points": [[1, 1], [8, 1], [8, 8], [1, 8]]},
              {"label": "IGNORE_me", "points": [[5, 5], [7, 5], [7, 7], [5, 7]]}]  # fmt: skip
    mask = draw_mask(shapes, 12, 12)
    assert mask[2, 2] == 1 and mask[6, 6] == 255 and mask[10, 10] == 0
    kept = ReasonTraining(mini, ignore="ignored")
    assert any(255 in kept.draw(np.random.default_rng(i)).masks for i in range(40))


def test_of_shapes_of_equal_area_the_earlier_wins():
    """The original sorts by area with NumPy, turns the order round, and draws: the later of two equal ones is drawn first."""
    left = {"label": "target", "points": [[1, 1], [6, 1], [6, 6], [1, 6]]}
    right = {"label": "ignore", "points": [[4, 1], [9, 1], [9, 6], [4, 6]]}
    assert draw_mask([left, right], 9, 12)[3, 4:7].tolist() == [1, 1, 1]
    assert draw_mask([right, left], 9, 12)[3, 4:7].tolist() == [255, 255, 255]
    assert draw_mask([left, {**right, "points": right["points"][:3]}], 9, 12)[3, 6] == 255  # smaller: drawn last

    rng = np.random.default_rng(0)
    for _ in range(20):  # squares of two sizes at random places, by the rule written out
        corners, sides = rng.integers(0, 20, (8, 2)), rng.choice([4, 7], 8)
        labels = rng.choice(["target", "ignore"], 8).tolist()
        expected = np.zeros((30, 30), np.uint8)
        areas = [(side + 1) ** 2 for side in sides]
        for i in np.argsort(areas, kind="stable")[::-1]:
            (x, y), side = corners[i], sides[i]
            expected[y : y + side + 1, x : x + side + 1] = 1 if labels[i] == "target" else 255
        shapes = [{"label": label, "points": [[x, y], [x + s, y], [x + s, y + s], [x, y + s]]}
                  for label, (x, y), s in zip(labels, corners.tolist(), sides.tolist(), strict=True)]  # fmt: skip
        assert np.array_equal(draw_mask(shapes, 30, 30), expected)


def test_short_questions_are_lower_cased_and_false_premises_asked_as_written(tmp_path):
    """The original lower-cases the short questions of what is there, and no false premise."""
    from dataset.mini.write import write_reason_seg
    from dataset.reason_seg import ReasonTraining

    write_reason_seg(tmp_path, 0, {"train": 1, "val": 1})
    for file in tmp_path.rglob("*.json"):
        content = json.loads(file.read_text())
        false = [["The RED Kite", False, "There is none."], ["Where is Bob's KITE?", 1, "Nowhere."]]
        file.write_text(json.dumps({**content, "text": ["The CUP of Tea"], "is_sentence": 0, "false_premise_QA": false}))
    data = ReasonTraining(tmp_path, k=2)
    drawn = [data.draw(np.random.default_rng(seed)) for seed in range(40)]
    asked = {(exists, turns[0][0].find("the cup of tea") >= 0, "The RED Kite" in turns[0][0], "Bob's KITE?" in turns[0][0])
             for sample in drawn for turns, exists in zip(sample.conversations, sample.exists, strict=True)}  # fmt: skip
    assert asked == {(True, True, False, False), (False, False, True, False), (False, False, False, True)}
    for kind in ("fixed", "random"):
        item = build_eval("ReasonSeg", "val", tmp_path, protocol="generate", templates=kind)[0]
        questions = [turns[0][0] for turns in item.conversations]
        assert item.exists == [True, False, False] and item.meta["is_sentence"] == [False, False, True]
        assert "the cup of tea" in questions[0] and "The RED Kite" in questions[1] and "Bob's KITE?" in questions[2]


def test_mini_writes_run_lengths_as_refer_has_them(mini):
    """The original's reader: polygons if the first entry is a list, else `mask.decode` of the whole list, counts encoded."""
    from pycocotools import mask as coco_mask

    kinds = set()
    for name in SPLIT_BY:
        refer = Refer(mini, name)
        sizes = {image["id"]: (image["height"], image["width"]) for image in refer.images.values()}
        for note in refer.annotations.values():
            found = note["segmentation"]
            kinds.add(type(found[0]))
            if isinstance(found[0], list):
                found = coco_mask.frPyObjects(found, *sizes[note["image_id"]])
            else:
                found = [{**rle, "counts": rle["counts"].encode()} for rle in found]
            mask = np.minimum(np.sum(coco_mask.decode(found), axis=2), 1)
            assert np.array_equal(mask, refer.mask(note["id"], *sizes[note["image_id"]])) and mask.any()
    assert kinds == {list, dict}
    for file in ("vlpart/pascal_part/train.json", "own/coco/instances_train.json"):  # COCO has a single one
        assert {type(note["segmentation"]) for note in json.loads((mini / file).read_text())["annotations"]} == {list, dict}


def test_label_maps_are_numbered_as_their_sets_do(mini):
    from PIL import Image

    from dataset.sem_seg import SOURCES

    for name, thing in (("ade20k", "apparel"), ("cocostuff", "clothes"), ("mapillary", "dress")):
        source = SOURCES[name](mini)
        found = 0
        for index in range(len(source)):
            content = source.content(index, np.random.default_rng(0))
            stored = np.array(Image.open(source.pairs[index][1]))
            nothing = 0 if name == "ade20k" else 255
            masks = np.stack([mask() for _, mask in content.present])
            assert np.array_equal(masks.sum(0), stored != nothing), "each labelled pixel is in one mask"
            value = stored[masks[0] == 1][0]
            assert content.present[0][0] == source.classes[int(value) - (name == "ade20k")]
            assert not {n for n, _ in content.present} & set(content.absent)
            found += thing in [n for n, _ in content.present]
        assert found or name == "mapillary"
    assert len(SOURCES["ade20k"](mini).classes) == 150 and len(SOURCES["cocostuff"](mini).classes) == 182
    assert "wall-other" not in SOURCES["cocostuff"](mini).content(0, np.random.default_rng(0)).absent


def test_parts_are_named_both_ways_and_masked_alone(mini):
    from dataset.sem_seg import SOURCES

    for name in ("pascal_part", "paco_lvis"):
        source = SOURCES[name](mini)
        said = set()
        for seed in range(4):
            content = source.content(0, np.random.default_rng(seed))
            notes = source.notes[source.images[0]["id"]]
            assert len(content.present) == len(notes)
            assert all(mask().sum() > 0 for _, mask in content.present)
            said |= {text for text, _ in content.present}
        assert any(text.startswith("the upper half of the ") for text in said)
        assert any(text.endswith(" upper half") and not text.startswith("the ") for text in said)
        assert not any("_(" in text or ":" in text for text in said)
        assert (name == "paco_lvis") == any("half" not in text for text in said)


def test_semantic_samples_ask_deny_and_correct(mini):
    names = "ade20k||cocostuff||pascal_part||paco_lvis||mapillary"
    mixture = build_train(["sem_seg"], [1], mini, sem_seg_data=names, num_classes_per_sample=3)
    seen = {}
    for index in range(150):
        sample = mixture.sample(0, index)
        segs = [reply.count("[SEG]") for ((_, reply),) in sample.conversations]
        assert sum(segs) == len(sample.masks) == sum(sample.exists) and len(segs) <= 3
        assert sample.masks.shape[1:] == sample.image.shape[:2] and all(mask.any() for mask in sample.masks)
        assert all(name in turns[0][0] for name, turns in zip(sample.questions, sample.conversations, strict=True))
        seen.setdefault(sample.meta["mode"], set()).add(sample.meta["dataset"])
    assert seen["true"] == set(names.split("||")) and seen["denial"] and seen["correction"]


def test_the_other_referring_sets(mini):
    kinds = {"R-": "neg_refer_seg", "fp": "correct_refer_seg"}
    for name in SPLIT_BY:
        family = kinds.get(name[:2], "refer_seg")
        mixture = build_train([family], [1], mini, **{f"{family}_data": name}, num_classes_per_sample=4)
        samples = [mixture.sample(0, i) for i in range(12)]
        assert {sample.meta["dataset"] for sample in samples} == {name}
        texts = [text for sample in samples for text in sample.questions]
        if family != "correct_refer_seg":  # false premises speak of places in every set
            assert any("of the" in text or "most" in text for text in texts) == (not name.endswith("+"))
        replies = [(reply, there) for s in samples for ((_, reply),), there in zip(s.conversations, s.exists, strict=True)]
        assert all(("[SEG]" in reply) == there for reply, there in replies)
        assert all(there for _, there in replies) == (family == "refer_seg")


def test_what_is_missing_is_named_at_once_and_left_out_only_if_allowed(mini, tmp_path, caplog):
    from shutil import copytree, rmtree

    mini = copytree(mini, tmp_path / "mini")
    for name in ("refclef", "R-refcoco+"):
        rmtree(mini / "refer_seg" / name)
    flags = {"sem_seg_data": "ade20k", "refer_seg_data": "refclef||refcoco", "neg_refer_seg_data": "R-refcoco+"}
    families = ["sem_seg", "refer_seg", "neg_refer_seg"]
    with pytest.raises(FileNotFoundError, match="(?s)refer_seg, refclef: .*neg_refer_seg, R-refcoco[+]: "):
        build_train(families, [1, 2, 3], mini, **flags)
    mixture = build_train(families, [1, 2, 3], mini, **flags, allow_missing=True)
    assert "refclef" in caplog.text and "R-refcoco" in caplog.text
    assert mixture.shares.tolist() == [1 / 3, 2 / 3]
    assert {mixture.sample(0, i).meta["dataset"] for i in range(20)} == {"ade20k", "refcoco"}
    with pytest.raises(FileNotFoundError, match="nothing of it is left"):
        build_train(["neg_refer_seg"], [1], mini, neg_refer_seg_data="R-refcoco+", allow_missing=True)


def test_dialogues_keep_their_turns_and_have_no_masks(mini, tmp_path):
    from dataset.vqa import VqaTraining

    data = VqaTraining(mini)
    items = json.loads((mini / "llava_dataset/llava_instruct_150k.json").read_text())
    for seed in range(6):
        sample = data.draw(np.random.default_rng(seed))
        (item,) = [item for item in items if item["id"] == sample.meta["id"]]
        (turns,) = sample.conversations
        assert [reply for _, reply in turns] == [said["value"] for said in item["conversations"][1::2]]
        assert [question for question, _ in turns][1:] == [said["value"] for said in item["conversations"][2::2]]
        assert "<image>" not in turns[0][0] and turns[0][0].strip() == turns[0][0] != ""
        assert sample.masks.shape == (0, *sample.image.shape[:2]) and sample.exists == [False]
    mixture = build_train(["vqa", "reason_seg"], [1, 1], mini)
    assert {mixture.sample(0, i).meta["dataset"] for i in range(20)} == {"llava_instruct_150k", "ReasonSeg"}


def test_files_without_a_dialogue_that_can_be_used(tmp_path):
    from dataset.vqa import VqaTraining

    folder = tmp_path / "llava_dataset"
    folder.mkdir()
    (tmp_path / "coco/train2017").mkdir(parents=True)
    for content, words in (
        ("[]", "must be a list"),
        ("{", "no JSON"),
        ('[{"image": "a.jpg"}]', "dialogue 0: lacks the field 'conversations'"),
        ('[{"image": "a.jpg", "conversations": [{"from": "human", "value": "Why?"}]}]', "must alternate"),
        ('[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]', "lacks the field 'image'"),
    ):
        (folder / "llava_instruct_150k.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            VqaTraining(tmp_path)


# ------------------------------------------------------------------------------------------------ mixture


def test_a_mixture_is_a_function_of_seed_epoch_and_index(mini):
    def texts(seed, epoch, indices):
        mixture = build_train(["refer_seg", "reason_seg"], [1, 1], mini, seed=seed, refer_seg_data="refcoco")
        return [str(mixture.sample(epoch, i).conversations) for i in indices]

    assert texts(1, 0, range(8)) == texts(1, 0, range(8))
    assert texts(1, 0, range(8)) != texts(1, 1, range(8)) and texts(1, 0, range(8)) != texts(2, 0, range(8))
    # Ranks take interleaved indices: they see different samples (in the original they drew the same ones, §8-19).
    assert texts(1, 0, range(0, 8, 2)) != texts(1, 0, range(1, 8, 2))


def test_rates_are_kept_and_checked(mini):
    class Fixed:
        def __init__(self, name):
            self.name = name

        def __len__(self):
            return 1

        def draw(self, rng):
            return self.name

    mixture = Mixture([Fixed("a"), Fixed("b")], [9, 1])
    drawn = [mixture.sample(0, i) for i in range(1000)]
    assert 860 < drawn.count("a") < 940
    with pytest.raises(ValueError, match="2 data sets .* but 1 sample rates"):
        build_train(["refer_seg", "reason_seg"], [1], mini)
    with pytest.raises(ValueError, match="grefcoco"):
        build_train(["grefcoco"], [1], mini)


# ------------------------------------------------------------------------------------------------ what is broken is named


def test_missing_files_are_named(mini, tmp_path):
    with pytest.raises(FileNotFoundError, match="instances.json|refs"):
        build_eval("R-refcocog", "val", tmp_path)
    with pytest.raises(FileNotFoundError, match="ReasonSeg/val"):
        build_eval("ReasonSeg", "val", tmp_path)
    with pytest.raises(ValueError, match="nosuch"):
        build_eval("nosuch", "val", mini)
    with pytest.raises(ValueError, match="testC"):
        build_eval("refcoco", "testC", mini)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "x.json"), ('{"text": ["a"], "shapes": []}', "is_sentence"), ('{"is_sentence": true, "shapes": []}', "text"),
     ('{"text": ["a"], "is_sentence": true, "shapes": [{"label": "target", "points": [[1]]}]}', "x.json")],
)  # fmt: skip
def test_broken_annotations_name_file_and_field(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        read_annotation(tmp_path / "x.json")
    assert "x.json" in str(error.value)


def test_old_encodings_are_read(tmp_path):
    text = json.dumps({"text": ["caf\u00e9"], "is_sentence": False, "shapes": []}, ensure_ascii=False)
    (tmp_path / "x.json").write_bytes(text.encode("cp1252"))
    assert read_annotation(tmp_path / "x.json").texts == ["caf\u00e9"]


class Trap:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickles_run_no_code(tmp_path, capsys):
    (tmp_path / "refs.p").write_bytes(pickle.dumps([Trap()]))
    with pytest.raises(ValueError, match="refs.p"):
        read_pickle(tmp_path / "refs.p")
    assert "code ran" not in capsys.readouterr().out


def test_masks_of_every_coco_kind(mini):
    refer = Refer(mini, "refcoco")
    square = [[2.0, 2.0, 9.0, 2.0, 9.0, 9.0, 2.0, 9.0]]
    refer.annotations = {
        1: {"segmentation": square},
        2: {"segmentation": square + square},
        3: {"segmentation": []},
        4: {"segmentation": {"size": [12, 12], "counts": [0, 5, 139]}},
    }
    assert refer.mask(1, 12, 12).sum() == refer.mask(2, 12, 12).sum() > 0
    assert refer.mask(2, 12, 12).max() == 1  # overlapping parts count once (§8-15)
    assert refer.mask(3, 12, 12).sum() == 0 and refer.mask(-1, 12, 12).sum() == 0
    assert refer.mask(4, 12, 12).sum() == 5
    assert refer.mask([1, 4], 12, 12).sum() >= refer.mask(1, 12, 12).sum()
    with pytest.raises(ValueError, match="annotation 9"):
        refer.mask(9, 12, 12)


# ------------------------------------------------------------------------------------------------ templates


def test_templates_have_their_numbers_and_roles():
    counts = {"SHORT_QUESTION": 100, "LONG_QUESTION": 48, "SHORT_ANSWER": 80, "LONG_ANSWER": 35, "NEG_ANSWER": 77,
              "CORRECT_ANSWER": 99}  # fmt: skip
    for name, count in counts.items():
        pool = getattr(templates, name)
        assert len(pool) == len(set(pool)) == count
        segs = 1 if name in ("SHORT_ANSWER", "LONG_ANSWER") else 0
        assert all(text.count("[SEG]") == segs and (not segs or text.endswith("[SEG].")) for text in pool)
    assert sum("{class_name}" in text for text in templates.SHORT_ANSWER) == 50
    assert sum("{class_name}" in text for text in templates.NEG_ANSWER) == 76
    assert all("{class_name}" in text and "{gt_name}" in text for text in templates.CORRECT_ANSWER)


def test_templates_stay_as_they_are():
    """Results are comparable as long as the sentences are the same: who changes one changes this too, and says so."""
    pools = {name: value for name, value in vars(templates).items() if name.isupper()}
    assert len(pools) == 9
    digest = hashlib.sha256(json.dumps(pools, sort_keys=True).encode()).hexdigest()
    assert digest.startswith("9cf198dae97ccc25")
    assert all("{sent}" in text for text in templates.LONG_QUESTION)


def test_false_premises_are_corrected_or_denied():
    rng = np.random.default_rng(0)
    false = {"sent": "The Red Bag", "exists": False, "gt_sent": "blue bag", "sent_id": 3}
    corrected = answer(false, rng, "fprefcoco")
    assert "the red bag" in corrected and "blue bag" in corrected and "[SEG]" not in corrected
    assert "[SEG]" not in answer({**false, "gt_sent": None}, rng, "R-refcoco")
    with pytest.raises(ValueError, match="gt_sent"):
        answer({**false, "gt_sent": None}, rng, "fprefcoco")


# ------------------------------------------------------------------------------------------------ python -m dataset.check


def test_check_counts_what_is_there(mini, capsys):
    from dataset.check import main

    assert main(["--dataset_dir", str(mini), "--pictures"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {tuple(line[1:3]): [int(n) for n in line[3:]] for line in lines if len(line) == 7 and line[3].isdigit()}
    for split in ("train", "val"):
        images = Refer(mini, "fprefcoco").of_split(split)
        truths = [s["exists"] for image in images for s in image.sentences]
        assert rows["fprefcoco", split] == [len(images), len(truths), sum(truths), len(truths) - sum(truths)]
    assert rows["ReasonSeg", "test"][0] == 2 and rows["ReasonSeg", "train"][3] > 0
    assert rows["llava_instruct_150k", "train"][:2] == [1, 1]
    assert rows["paco_lvis", "train"][2] > rows["pascal_part", "train"][0]
    told = [" ".join(line) for line in lines]
    assert not any(line.startswith("missing") for line in told)
    assert "trains refer_seg: refclef, refcoco, refcoco+, refcocog" in told


def test_check_says_what_is_missing_and_broken(mini, tmp_path, capsys):
    from shutil import copytree, rmtree

    from dataset.check import main

    assert main(["--dataset_dir", str(tmp_path)]) == 1
    assert "trains   nothing" in capsys.readouterr().out
    copy = copytree(mini, tmp_path / "copy")
    rmtree(copy / "refer_seg/R-refcocog")
    assert main(["--dataset_dir", str(copy), "--dataset", "neg_refer_seg"]) == 1  # asked for, and not all there
    out = capsys.readouterr().out
    assert "missing  R-refcocog:" in out and "refs(umd_exclude_unified).p" in out
    note = next((copy / "reason_seg/ReasonSeg/val").glob("*.json"))
    note.write_text('{"text": "Where?"}')
    refer = Refer(copy, "refcoco")
    picture = refer.of_split("val")[0]
    (refer.image_dir / picture.file_name).unlink()
    content = json.loads(refer.instances_file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["id"] != picture.sentences[0]["ann_id"]]
    refer.instances_file.write_text(json.dumps(content))
    assert main(["--dataset_dir", str(copy), "--dataset", "refcoco||ReasonSeg"]) == 2
    out = capsys.readouterr().out
    assert f"{note} lacks the field" in out and f"{picture.file_name} does not exist" in out
    assert f"has no annotation {picture.sentences[0]['ann_id']}" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset_dir", "{mini}", "--dataset", "grefcoco"], "no data set 'grefcoco'"),
        (["--dataset_dir", "{mini}", "--dataset", "vqa||"], "no data set ''"),
        (["--dataset_dir", "{mini}/nowhere"], "--dataset_dir .*nowhere does not exist"),
        (["--dataset_dir", "{mini}/coco/train2017/000000000000.jpg"], "--dataset_dir .*jpg is no folder"),
        (["--own_data", ""], "--own_data '': a path is empty"),
        (["--own_data", "{mini}/own/table||"], "--own_data .*: a path is empty"),
    ],
)
def test_check_ends_with_one_line_where_a_flag_is_wrong(mini, capsys, flags, words):
    from dataset.check import main

    with pytest.raises(SystemExit) as ended:
        main([flag.format(mini=mini) for flag in flags])
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == "" and re.fullmatch(f"dataset.check: {words}.*\n", told.err)


def test_empty_members_of_a_mixture_are_refused(mini):
    for flags in ({"sem_seg_data": "ade20k||"}, {"sem_seg_data": ""}):
        with pytest.raises(ValueError, match="the data set 'sem_seg' has an empty member"):
            build_train(["sem_seg"], [1], mini, **flags)
    with pytest.raises(ValueError, match="the data set 'own' has an empty member"):  # it would be the working directory
        build_train(["own"], [1], mini, own_data=f"{mini}/own/table||")
    for name in ("", "~nobody-here/data"):
        with pytest.raises(ValueError, match="no evaluation set"):
            build_eval(name, "val", mini)
