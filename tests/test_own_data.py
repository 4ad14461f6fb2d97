"""Own data: tables, COCO files and LabelMe files as people have them, whole and broken, from disk to samples."""

import base64
import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from dataset import build_eval, build_train, own, templates
from dataset.check import main as check
from dataset.mini.write import write_own
from dataset.own import OwnDataError, OwnEvaluation, OwnTraining, open_split, read_mask

HEIGHT, WIDTH = 24, 32


def picture(file, height=HEIGHT, width=WIDTH):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(file)
    return file


def box(top=2, left=3, bottom=8, right=9, value=255, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = value
    return mask


def table(folder, *rows, header="image,mask,question", name="questions.csv"):
    """A folder with a.jpg, b.jpg, their mask m.png, and a table of those rows."""
    picture(folder / "a.jpg")
    picture(folder / "b.jpg")
    Image.fromarray(box()).save(folder / "m.png")
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder


def coco(file, annotations, images=("a.jpg",), names=("cup", "red_bag", "lamp")):
    content = {
        "images": [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in enumerate(images)],
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(names)],
        "annotations": [{"id": 100 + i, **annotation} for i, annotation in enumerate(annotations)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


SQUARE = [[3.0, 2.0, 9.0, 2.0, 9.0, 8.0, 3.0, 8.0]]


def note(category, segmentation=SQUARE, image=0, **more):
    return {"image_id": image, "category_id": 10 + category, "segmentation": segmentation, **more}


def labelme(file, *shapes, **fields):
    picture(file.with_suffix(".jpg"))
    shapes = [dict(zip(("label", "points", "shape_type"), shape, strict=False)) for shape in shapes]
    file.write_text(json.dumps({"shapes": shapes, **fields}))
    return file.parent


CORNERS = [[3, 2], [9, 2], [9, 8], [3, 8]]


def draws(data, count=60):
    return [data.draw(np.random.default_rng(seed)) for seed in range(count)]


def said(data, count=60):
    """{question: {answers}} of many draws."""
    found = {}
    for sample in draws(data, count):
        for text, ((_, reply),) in zip(sample.questions, sample.conversations, strict=True):
            found.setdefault(text, set()).add(reply)
    return found


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini")
    write_own(root, 3, {"train": 4, "val": 3})
    return root / "own"


# ------------------------------------------------------------------------------------------------ what all forms keep


@pytest.mark.parametrize("form", ["table", "coco", "labelme"])
def test_each_form_trains_and_is_measured_by_its_path(mini, form):
    path = str(mini / form)
    mixture = build_train(["own"], [1], "/no/such/dir", own_data=path, num_classes_per_sample=3)
    assert len(mixture) == 4
    kinds = set()
    for index in range(60):
        sample = mixture.sample(0, index)
        assert sample.image_path.startswith(path) and "val" not in sample.image_path
        assert sample.meta["dataset"] == path and len(sample.meta["is_sentence"]) == len(sample.conversations) <= 3
        segs = [reply.count("[SEG]") for ((_, reply),) in sample.conversations]
        assert segs == [int(exists) for exists in sample.exists] and sum(segs) == len(sample.masks)
        assert sample.masks.shape[1:] == sample.image.shape[:2] and sample.masks.dtype == np.uint8
        assert all((mask == 1).any() for mask in sample.masks) and set(np.unique(sample.masks)) <= {0, 1, 255}
        for text, ((asks, _),) in zip(sample.questions, sample.conversations, strict=True):
            assert text.lower() in asks.lower() and asks != text
        kinds |= set(sample.exists)
    assert kinds == ({True} if form == "labelme" else {True, False})
    assert [str(mixture.sample(1, i).conversations) for i in range(8)] == [
        str(mixture.sample(1, i).conversations) for i in range(8)
    ]
    forced, free = (build_eval(path, "val", "/no/such/dir", protocol=protocol) for protocol in ("forced", "generate"))
    assert len(forced) == len(free) == 3
    for i in range(3):
        a, b = forced[i], free[i]
        assert all(a.exists) and all(reply == templates.EVAL_ANSWER for ((_, reply),) in a.conversations)
        assert all(reply is None for ((_, reply),) in b.conversations)
        assert a.questions == b.questions[: len(a.questions)] and (form == "labelme") == all(b.exists)
        for sample in (a, b):
            assert len(sample.masks) == len(sample.conversations) == len(sample.exists) == len(sample.questions) > 0
            assert [bool((mask == 1).any()) for mask in sample.masks] == sample.exists
            assert sample.meta["split"] == "val" and "train" not in sample.image_path
    drawn = [build_eval(path, "val", ".", templates="random", seed=seed)[0].conversations for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(reply.count("[SEG]") == 1 for ((_, reply),) in drawn[0])
    assert check(["--own_data", path]) == 0


def test_two_members_have_even_odds_and_what_is_missing_may_be_left_out(mini, tmp_path, caplog):
    table(tmp_path, "a.jpg,m.png,cup")
    both = f"{mini / 'coco'}||{tmp_path}"
    drawn = [build_train(["own"], [1], ".", own_data=both).sample(0, i).meta["dataset"] for i in range(200)]
    assert 70 < drawn.count(str(tmp_path)) < 130  # though it has one picture, and the other four
    with pytest.raises(FileNotFoundError, match="(?s)own, .*nosuch does not exist.*questions.csv"):
        build_train(["own"], [1], ".", own_data=f"{both}||{tmp_path / 'nosuch'}")
    assert len(build_train(["own"], [1], ".", own_data=f"{both}||{tmp_path / 'nosuch'}", allow_missing=True)) == 5
    assert "nosuch" in caplog.text
    for names, path in ((["own"], ""), (["reason_seg"], both)):
        with pytest.raises(ValueError, match="'own' and --own_data PATH need each other"):
            build_train(names, [1], ".", own_data=path)


def test_names_that_are_neither_sets_nor_paths(tmp_path):
    with pytest.raises(ValueError, match="(?s)'nosuch'.*ReasonSeg, refclef.*questions.csv"):
        build_eval("nosuch", "val", tmp_path)
    with pytest.raises(FileNotFoundError, match="ReasonSeg/val"):  # a set's name wins over a folder of that name
        build_eval("ReasonSeg", "val", tmp_path)


def test_ignored_regions_of_reason_seg_can_be_left_out(tmp_path):
    folder = tmp_path / "reason_seg/ReasonSeg/train"
    folder.mkdir(parents=True)
    labelme(folder / "a.json", ("target", CORNERS), ("ignore", [[20, 2], [25, 2], [25, 8]]), text="cup", is_sentence=False)
    for ignore, values in (("background", {0, 1}), ("ignored", {0, 1, 255})):
        mixture = build_train(["reason_seg"], [1], tmp_path, reason_seg_ignore=ignore)
        assert set(np.unique(mixture.sample(0, 0).masks)) == values
    with pytest.raises(ValueError, match="ignore must be"):
        build_train(["reason_seg"], [1], tmp_path, reason_seg_ignore="no")


# ------------------------------------------------------------------------------------------------ table


def test_the_example_of_the_docstring(tmp_path):
    for name in ("desk.jpg", "shelf.jpg"):
        picture(tmp_path / name)
    for name in ("cup.png", "lamp.png"):
        Image.fromarray(box()).save(tmp_path / name)
    (tmp_path / "questions.csv").write_text(
        "image,mask,question,split\ndesk.jpg,cup.png,the blue cup,train\ndesk.jpg,,the stapler,train\n"
        "shelf.jpg,lamp.png,Which of these would help me to read?,val\n"
    )
    data = OwnTraining(tmp_path, 2)
    assert len(data) == 1
    sample = data.draw(np.random.default_rng(0))
    assert dict(zip(sample.questions, sample.exists, strict=True)) == {"the blue cup": True, "the stapler": False}
    assert np.array_equal(sample.masks, box(value=1)[None])
    asked = OwnEvaluation(tmp_path, "val", "forced")[0]
    assert asked.conversations[0][0][0] == "Which of these would help me to read? Please output segmentation mask."


def test_tables_of_every_spelling_say_the_same(tmp_path):
    rows = ["a.jpg;m.png;the cup, left;Ja, da: [SEG].;no", "./a.jpg;;Wo ist das Öl?;;", ";;;;", "b.jpg;m.png;cup;;TRUE"]
    header = "Image;mask ;question;answer;is_sentence"
    table(tmp_path / "semicolon", *rows, header=header)
    plain = (tmp_path / "semicolon/questions.csv").read_text()
    written = {
        "bom": b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode(),
        "excel": plain.encode("utf-16"),
        "tab": plain.replace(";", "\t").encode(),
        "comma": plain.replace("the cup, left", '"the cup, left"').replace("Ja, da: [SEG].", '"Ja, da: [SEG]."')
                      .replace(";", ", ").encode(),
    }  # fmt: skip
    for name, data in written.items():
        (table(tmp_path / name) / "questions.csv").write_bytes(data)
    lines = [
        {"image": "a.jpg", "mask": "m.png", "question": "the cup, left", "answer": "Ja, da: [SEG].", "is_sentence": False},
        {"image": "a.jpg", "mask": None, "question": "Wo ist das Öl?"},
        {"image": "b.jpg", "mask": "m.png", "question": "cup", "is_sentence": "true"},
    ]
    folder = table(tmp_path / "jsonl", name="mine.jsonl")
    (folder / "mine.jsonl").write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n")
    for path in (tmp_path / "semicolon", *(tmp_path / name for name in written), folder / "mine.jsonl"):
        found = open_split(path, "train").pictures
        assert [(p.path.name, [(q.text, q.is_sentence, q.exists, q.answer) for q in p.questions]) for p in found] == [
            ("a.jpg", [("the cup, left", False, True, "Ja, da: [SEG]."), ("Wo ist das Öl?", True, False, None)]),
            ("b.jpg", [("cup", True, True, None)]),
        ], path


def test_what_is_not_zero_is_the_object(tmp_path):
    """255 of a 0/255 mask is the object, though it is what ReasonSeg leaves out."""
    solid = box(value=1)
    grey = Image.fromarray(solid * 255)
    palette = Image.fromarray(solid * 3)
    palette.putpalette([255, 255, 255] * 256)  # colours do not count, numbers do
    clear = np.dstack([np.full((HEIGHT, WIDTH, 3), 255, np.uint8), solid * 255])
    kinds = {
        "grey": grey, "ones": Image.fromarray(solid), "bits": grey.convert("1"), "palette": palette,
        "deep": Image.fromarray(solid.astype(np.uint16) * 700), "blue": Image.fromarray(np.dstack([solid * 0] * 2 + [solid])),
        "transparent": Image.fromarray(clear), "opaque": grey.convert("RGBA"), "grey_alpha": grey.convert("LA"),
    }  # fmt: skip
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
        mask = read_mask(tmp_path / f"{name}.png")
        assert mask.dtype == np.uint8 and np.array_equal(mask, solid), name
    grey.save(tmp_path / "m.tif")
    assert np.array_equal(read_mask(tmp_path / "m.tif"), solid)


def test_answers_are_given_completed_or_made(tmp_path):
    table(
        tmp_path, "a.jpg,m.png,one,It is [SEG] there.,", "a.jpg,m.png,two,By the door,", "a.jpg,m.png,three,Here!,",
        "a.jpg,m.png,four,,", "a.jpg,m.png,Why five?,,", "a.jpg,,six,No six here.,seven", "a.jpg,,Eight,,the Nine",
        "a.jpg,,ten,,", "a.jpg,,Who needs eleven?,,", "a.jpg,,Who needs twelve?,,thirteen",
        header="image,mask,question,answer,correction",
    )  # fmt: skip
    replies = said(OwnTraining(tmp_path, 4), 200)
    assert replies["one"] == {"It is [SEG] there."}
    assert replies["two"] == {"By the door. The segmentation result is [SEG]."}
    assert replies["three"] == {"Here! The segmentation result is [SEG]."}
    assert replies["six"] == {"No six here."}
    assert replies["four"] <= {text.format(class_name="four") for text in templates.SHORT_ANSWER}
    assert replies["Why five?"] <= set(templates.LONG_ANSWER)
    assert replies["Eight"] <= {t.format(class_name="eight", gt_name="the nine") for t in templates.CORRECT_ANSWER}
    assert replies["ten"] <= {text.format(class_name="ten") for text in templates.NEG_ANSWER}
    assert all(len(replies[name]) > 5 for name in ("four", "Why five?", "Eight", "ten", "Who needs eleven?"))
    for name in ("eleven", "twelve"):  # a denial has no room for a sentence
        assert all("[SEG]" not in reply and name not in reply for reply in replies[f"Who needs {name}?"])
    assert all("thirteen" in reply for reply in replies["Who needs twelve?"])


def test_rows_are_drawn_alike(tmp_path):
    table(tmp_path, "a.jpg,m.png,cup", *(f"a.jpg,,thing {i}" for i in range(3)))
    drawn = [sample.exists[0] for sample in draws(OwnTraining(tmp_path), 200)]
    assert 30 < sum(drawn) < 70


ROWS = [
    ("c.jpg,m.png,cup", "line 2, image: .*c.jpg does not exist"),
    (",m.png,cup", "line 2, image: is empty"),
    ("a.jpg,c.png,cup", "line 2, mask: .*c.png does not exist"),
    ("a.jpg,a.jpg,cup", "line 2, mask: must be one of .png, .* a JPEG blurs"),
    ("a.jpg,m.png, ", "line 2, question: is empty"),
    ("a.jpg,m.png,a <image> cup", "line 2, question: must not contain <image>"),
    ("a.jpg,m.png,cup [seg]", r"line 2, question: must not contain \[SEG\]"),
    ("a.jpg,m.png,cup,[SEG] and [SEG].", r"line 2, answer: one \[SEG\] in capitals at most"),
    ("a.jpg,m.png,cup,It is [seg].", r"line 2, answer: one \[SEG\] in capitals"),
    ("a.jpg,,cup,It is [SEG].", r"line 2, answer: no \[SEG\], as there is no mask"),
    ("a.jpg,m.png,cup,,maybe", "line 2, is_sentence: must be true, false or empty, found 'maybe'"),
    ("a.jpg,m.png,cup,,,dev", "line 2, split: must be train, val, test or empty, found 'dev'"),
    ("a.jpg,,cup,,,,true", "line 2, exists: true, but there is no mask"),
    ("a.jpg,m.png,cup,,,,no", "line 2, exists: false, so the mask must be left empty"),
    ("a.jpg,m.png,cup,,,,,red cup", "line 2, correction: is for what is not there"),
    ("a.jpg,m.png,cup\na.jpg,,CUP", "line 3, question: line 2 asks it of the same picture with another mask"),
    ("a.jpg,m.png,the cup, left,,,,,,", "line 2: more cells than columns: text that contains ',' needs quotes"),
    ('a.jpg,m.png,"cup\nb.jpg,m.png,cup', "is a quote not closed"),
    ("", "it has no rows"),
]


@pytest.mark.parametrize(("rows", "words"), ROWS, ids=[words[:40] for _, words in ROWS])
def test_faults_of_a_table_are_named(tmp_path, capsys, rows, words):
    table(tmp_path, rows, header="image,mask,question,answer,is_sentence,split,exists,correction")
    with pytest.raises(OwnDataError, match=f"(?s)questions.csv cannot be used:\n  .*{words}"):
        OwnTraining(tmp_path)
    assert check(["--own_data", str(tmp_path)]) == 2
    assert f"broken   {tmp_path}: {tmp_path / 'questions.csv'}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("image,mask_path,question", "(?s)line 1, 'mask_path': no such column; .*line 1, mask: is lacking"),
        ("image,question", "line 1, mask: is lacking .what is not there has an empty mask"),
        ("image,mask,question,question", "line 1, question: is there twice"),
        ("image,mask,question,", "line 1, '': no such column"),
        ("", "line 1, image: is lacking"),
    ],
)
def test_faults_of_a_header_are_told_once(tmp_path, header, words):
    table(tmp_path, "a.jpg,m.png,cup", "b.jpg,m.png,cup", header=header)
    with pytest.raises(OwnDataError, match=words) as error:
        OwnTraining(tmp_path)
    assert all(fault.startswith(f"{tmp_path / 'questions.csv'}: line 1, ") for fault in error.value.faults)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "a.jpg"', "line 1: no JSON object"),
        ('["a.jpg"]', "line 1: no JSON object"),
        ('{"image": "a.jpg", "question": "cup"}', "line 1, mask: is lacking"),
        ('{"image": "a.jpg", "mask": "m.png", "question": ["cup", "mug"]}', "line 1, question: must be text"),
        ('{"image": "a.jpg", "mask": "m.png", "question": "cup", "label": 3}', "line 1, 'label': no such column"),
    ],
)
def test_faults_of_json_lines_are_named(tmp_path, line, words):
    (table(tmp_path) / "questions.csv").rename(tmp_path / "questions.jsonl")
    (tmp_path / "questions.jsonl").write_text(line + '\n{"image": "b.jpg", "mask": null, "question": ""}')
    with pytest.raises(OwnDataError, match=f"(?s){words}.*line 2, question: is empty"):
        OwnTraining(tmp_path)


HEADER, ROW = "image,mask,question", "a.jpg,m.png,der blaue Becher für Öl"


@pytest.mark.parametrize(
    "data",
    [
        f"{HEADER}\n{ROW}\n".replace(",", "\t").encode("utf-16"),  # Excel: Unicode Text
        f"{HEADER}\r\n{ROW}".encode("utf-16"),
        f"{HEADER}\r\n{ROW}".encode("utf-8-sig"),
        f"sep=;\r\n{HEADER}\r\n{ROW}\r\n".replace(",", ";").encode(),
        f"\ufeffSEP=|\n{HEADER}\n{ROW}\n".replace(",", "|").encode(),
        f'"sep=;"\n{HEADER}\n{ROW}\n'.replace(",", ";").encode(),
        f"sep=\t\n{HEADER}\n{ROW}\n".replace(",", "\t").encode("utf-16"),
        f"sep=,\r{HEADER}\r{ROW}\r".encode(),
        f"{HEADER}\r{ROW}\r".encode(),
    ],
)
def test_tables_are_read_as_excel_and_others_write_them(tmp_path, data):
    (table(tmp_path) / "questions.csv").write_bytes(data)
    (found,) = open_split(tmp_path, "train").pictures
    assert (found.path.name, [(q.text, q.exists) for q in found.questions]) == ("a.jpg", [("der blaue Becher für Öl", True)])


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\r", "\n\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_lines_are_read_with_every_line_end(tmp_path, separator, encoding):
    lines = [json.dumps({"image": name, "mask": "", "question": "Öl\u2028!"}, ensure_ascii=False) for name in ("a.jpg", "b.jpg")]
    (table(tmp_path) / "questions.csv").unlink()
    (tmp_path / "questions.jsonl").write_bytes(separator.join(lines).encode(encoding))
    assert [found.questions[0].text for found in open_split(tmp_path, "train").pictures] == ["Öl !"] * 2


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("蓝色的杯子", "gbk"), ("青いカップ", "cp932"), ("빨간 컵", "cp949"), ("синяя чашка", "cp1251"), ("míč", "cp1250"),
     ("café", "cp1252")],
)
@pytest.mark.parametrize("name", ["questions.csv", "questions.jsonl"])
def test_tables_in_another_encoding_are_refused_with_their_line(tmp_path, capsys, text, encoding, name):
    """Read as cp1252, all of them would train as nonsense."""
    (table(tmp_path) / "questions.csv").unlink()
    good, line = (f"{HEADER}\n", f"a.jpg,m.png,{text}\n") if name.endswith("csv") else ("\n", f'{{"image": "{text}"}}')
    (tmp_path / name).write_bytes((good + line).encode(encoding))
    with pytest.raises(ValueError, match=rf"{name}, line 2: is no UTF-8 text .*save it as UTF-8"):
        OwnTraining(tmp_path)
    assert check(["--own_data", str(tmp_path)]) == 2
    assert capsys.readouterr().out.count("broken ") == 1


def test_utf_16_without_its_mark_is_named(tmp_path):
    (table(tmp_path) / "questions.csv").write_bytes(f"{HEADER}\na.jpg,m.png,cup".encode("utf-16-le"))
    with pytest.raises(OwnDataError, match="line 1: it is UTF-16 without its byte order mark"):
        OwnTraining(tmp_path)


def test_lines_are_counted_from_the_first_line_of_the_file(tmp_path):
    table(tmp_path, HEADER, "a.jpg,m.png,cup", "a.jpg,c.png,bag", header="sep=,")
    with pytest.raises(OwnDataError, match="line 4, mask: .*c.png does not exist"):
        OwnTraining(tmp_path)
    table(tmp_path, "image,mask", header="sep=,")
    with pytest.raises(OwnDataError, match="line 2, question: is lacking"):
        OwnTraining(tmp_path)


MARKS = ["a <s>red</s> cup", "the </s> cup", "a ASSISTANT: b", "a <unk>", "<image>", "<IM_START>", "cup <im_end>", "a\0cup"]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("column", ["question", "answer", "correction"])
def test_marks_of_the_conversation_in_a_table_are_found_when_it_is_opened(tmp_path, capsys, column, mark):
    """They used to stop the training at a random step."""
    row = {"image": "a.jpg", "mask": "", "question": "cup", "answer": "", "correction": "", column: mark}
    table(tmp_path, ",".join(row.values()), header=",".join(row))
    with pytest.raises(OwnDataError, match=f"line 2, {column}: must not contain"):
        OwnTraining(tmp_path)
    assert check(["--own_data", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("question", 5), ("question", True), ("question", {"en": "cup"}), ("image", ["a.jpg"]), ("mask", False), ("mask", 0),
     ("answer", 1.5), ("correction", []), ("split", 1), ("is_sentence", 0.0), ("exists", [True]), ("exists", "maybe"),
     ("exists", 7), ("question", "\n \t"), ("question", "\ud800")],
)  # fmt: skip
def test_values_of_other_kinds_in_json_lines_are_named(tmp_path, name, value):
    (table(tmp_path) / "questions.csv").unlink()
    record = {"image": "a.jpg", "mask": "m.png", "question": "cup", name: value}
    (tmp_path / "questions.jsonl").write_text(json.dumps(record))
    with pytest.raises(OwnDataError, match=f"questions.jsonl cannot be used:\n  line 1, {name}: "):
        OwnTraining(tmp_path)


def test_a_column_that_is_spelled_twice_is_named(tmp_path):
    (table(tmp_path) / "questions.csv").unlink()
    (tmp_path / "questions.jsonl").write_text('{"image": "a.jpg", "mask": "m.png", " Mask": "", "question": "cup"}')
    with pytest.raises(OwnDataError, match="line 1, mask: is there twice"):
        OwnTraining(tmp_path)


def test_a_table_that_is_no_text_is_named(tmp_path):
    for content, words in ((b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
                           (b"<!DOCTYPE html><html>", "is a web page")):  # fmt: skip
        (table(tmp_path) / "questions.csv").write_bytes(content)
        with pytest.raises(ValueError, match=f"questions.csv {words}|questions.csv is .*{words}"):
            OwnTraining(tmp_path)
        assert check(["--own_data", str(tmp_path)]) == 2


def test_folders_and_long_names_in_a_table_are_named(tmp_path):
    (tmp_path / "d.jpg").mkdir()
    table(tmp_path, "d.jpg,m.png,cup", f"{'x' * 300}.jpg,m.png,cup")
    with pytest.raises(OwnDataError, match="(?s)line 2, image: .*d.jpg is a folder.*line 3, image: .*xxx.jpg does not exist"):
        OwnTraining(tmp_path)


def test_all_faults_are_gathered_and_the_first_told(tmp_path, capsys):
    table(tmp_path, *(f"a.jpg,m{i}.png,cup {i}" for i in range(25)), "a.jpg,m.png,cup")
    with pytest.raises(OwnDataError, match="(?s)line 2, .*line 21, .*and 5 more$") as error:
        OwnTraining(tmp_path)
    assert "line 22" not in str(error.value) and len(error.value.faults) == 25
    assert check(["--own_data", str(tmp_path)]) == 2
    told = capsys.readouterr().out
    assert "m19.png does not exist" in told and "m20.png" not in told and "and 5 more" in told


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: Image.fromarray(box(height=12)).save(file), "line 2: the mask is 12 high and 32 wide, but .*a.jpg is 24"),
        (lambda file: Image.fromarray(box(value=0)).save(file), "line 2: .*m.png is 0 everywhere: leave the cell"),
        (lambda file: file.write_bytes(b"no PNG"), "line 2: .*m.png cannot be read as a mask"),
        (lambda file: file.write_bytes(file.read_bytes()[:60]), "line 2: .*m.png cannot be read as a mask"),
    ],
)
def test_masks_are_opened_late_and_their_faults_named(tmp_path, capsys, spoil, words):
    table(tmp_path, "a.jpg,m.png,cup,", "a.jpg,m.png,cup,val", header="image,mask,question,split")
    spoil(tmp_path / "m.png")
    data, asked = OwnTraining(tmp_path), OwnEvaluation(tmp_path, "val", "forced")
    with pytest.raises(ValueError, match=words):
        data.draw(np.random.default_rng(0))
    with pytest.raises(ValueError, match=words.replace("line 2", "line 3")):
        asked[0]
    assert check(["--own_data", str(tmp_path)]) == 2
    assert capsys.readouterr().out.count(f"broken   {tmp_path}: ") == 2


def test_broken_pictures_are_named(tmp_path, capsys):
    (table(tmp_path, "a.jpg,m.png,cup", "b.jpg,m.png,cup") / "a.jpg").write_bytes(b"no JPEG")
    assert check(["--own_data", str(tmp_path)]) == 2
    assert "a.jpg cannot be read" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a.jpg cannot be read"):
        draws(OwnTraining(tmp_path), 20)


# ------------------------------------------------------------------------------------------------ COCO


def test_annotations_of_a_category_are_one_mask_whatever_their_kind(tmp_path):
    left, right = box(value=1), box(10, 20, 20, 30, value=1)
    compressed = coco_mask.encode(np.asfortranarray(right))
    counts = [int(number) for number in np.diff(np.flatnonzero(np.diff(right.T.ravel(), prepend=0, append=0)), prepend=0)]
    crowd = {"size": [HEIGHT, WIDTH], "counts": [*counts, right.size - sum(counts)]}
    file = coco(
        tmp_path / "mine.json",
        [note(0, SQUARE + SQUARE), note(0, {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()}),
         note(1, crowd, iscrowd=1), note(2, image=1)],
        images=("a.jpg", "sub/b.jpg", "c.jpg"),
    )  # fmt: skip
    picture(tmp_path / "a.jpg"), picture(tmp_path / "images/sub/b.jpg")  # c.jpg has no annotation and need not be there
    for path in (file, tmp_path):
        data = OwnEvaluation(path, "train", "forced")
        assert [data[i].questions for i in range(len(data))] == [["cup", "red bag"], ["lamp"]]
        cup, bag = data[0].masks
        polygon = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(SQUARE, HEIGHT, WIDTH)))
        assert np.array_equal(cup, polygon | right) and np.array_equal(bag, right)
        assert abs(int(polygon.sum()) - int(left.sum())) < 8


def test_absent_categories_are_denied_and_corrected_in_the_shares_of_the_semantic_sets(tmp_path):
    names = ("cup", "Cup", "red_bag", "lamp", "never_used")
    coco(tmp_path / "a.json", [note(0), note(1), note(2, image=1), note(3, image=1)], ("a.jpg", "b.jpg"), names)
    picture(tmp_path / "a.jpg"), picture(tmp_path / "b.jpg")
    kinds = []
    for sample in draws(OwnTraining(tmp_path), 1500):
        (text,), (exists,), ((_, reply),) = sample.questions, sample.exists, sample.conversations[0]
        here, there = ({"cup"}, {"red bag", "lamp"})[:: 1 if sample.image_path.endswith("a.jpg") else -1]
        assert text in (here if exists else there) and len(sample.masks) == exists
        corrected = {t.format(class_name=text, gt_name=name) for t in templates.CORRECT_ANSWER for name in here}
        kinds.append("true" if exists else "corrected" if reply in corrected else "denied")
        assert kinds[-1] != "denied" or reply in {t.format(class_name=text) for t in templates.NEG_ANSWER}
    shares = [kinds.count(kind) / len(kinds) for kind in ("true", "denied", "corrected")]
    assert np.abs(np.subtract(shares, (0.85, 0.07, 0.08))).max() < 0.03
    asked = OwnEvaluation(tmp_path, "train", "generate")
    assert [sum(asked[i].exists) for i in range(2)] == [1, 2] and [len(asked[i].exists) for i in range(2)] == [2, 3]
    assert asked[0].questions == asked[0].questions and not asked[0].masks[1].any()


def test_coco_pictures_are_found_where_coco_puts_them(tmp_path):
    for folder in ("coco", "coco/images"):
        base = tmp_path / folder.replace("/", "_")
        for split in ("train2017", "val2017"):
            coco(base / f"annotations/instances_{split}.json", [note(0)])
            picture(base / folder.replace("coco", "").strip("/") / split / "a.jpg")
        for split in ("train", "val"):
            assert OwnEvaluation(base / "annotations", split, "forced")[0].image_path.endswith(f"{split}2017/a.jpg")
        alone = base / "annotations/instances_val2017.json"
        assert len(OwnEvaluation(alone, "val", "forced")) == 1
        with pytest.raises(ValueError, match="no split 'train', only val"):
            OwnTraining(alone)


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ([note(0, image=7)], "annotation 100, image_id: there is no 7"),
        ([note(9)], "annotation 100, category_id: there is no 19"),
        ([note(0, [])], "annotation 100, segmentation: is empty, and a box alone is no mask"),
        ([note(0, image=1)], "image 1, file_name: gone.jpg is neither beside the file nor in `images`"),
        ([{"image_id": 0, "category_id": 10}], r"annotations\[0\] lacks the field 'segmentation'"),
        ([], "it has no annotations"),
    ],
)
def test_faults_of_a_coco_file_are_named(tmp_path, annotations, words):
    picture(tmp_path / "a.jpg")
    file = coco(tmp_path / "mine.json", annotations, ("a.jpg", "gone.jpg"))
    with pytest.raises(OwnDataError, match=f"mine.json cannot be used:\n  {words}"):
        OwnTraining(file)
    assert check(["--own_data", str(file)]) == 2


def test_shapes_that_do_not_fit_their_picture(tmp_path, capsys):
    cases = [("a.jpg", SQUARE), ("b.jpg", {"size": [12, 12], "counts": [0, 5, 139]}), ("c.jpg", {"counts": 3}),
             ("d.jpg", [[300.0, 300.0, 310.0, 300.0, 310.0, 310.0]])]  # fmt: skip
    coco(tmp_path / "a.json", [note(0, shape, i) for i, (_, shape) in enumerate(cases)], [name for name, _ in cases])
    for name, _ in cases:
        picture(tmp_path / name, *((30, 40) if name == "a.jpg" else (HEIGHT, WIDTH)))
    data = OwnEvaluation(tmp_path, "train", "forced")
    with pytest.raises(ValueError, match="image 0, category 'cup': the mask is 24 high and 32 wide, but .*a.jpg is 30 and 40"):
        data[0]
    with pytest.raises(ValueError, match="annotation 101 does not fit 24 x 32 pixels"):
        data[1]
    with pytest.raises(ValueError, match="annotation 102 does not fit"):
        data[2]
    assert data[3].questions == [] and data[3].masks.shape == (0, HEIGHT, WIDTH)  # outside of the picture: left out
    assert check(["--own_data", str(tmp_path)]) == 2
    told = capsys.readouterr().out
    assert told.count("broken ") == 4 and "image 3, category 'cup': its shapes cover nothing" in told
    coco(tmp_path / "a.json", [note(0, cases[3][1]), note(1, image=1)], ("c.jpg", "d.jpg"))
    assert {tuple(sample.questions) for sample in draws(OwnTraining(tmp_path)) if all(sample.exists)} == {("red bag",)}
    coco(tmp_path / "a.json", [note(0, cases[3][1])], ("d.jpg",))
    with pytest.raises(ValueError, match="100 images in a row have shapes that cover no pixel"):
        OwnTraining(tmp_path).draw(np.random.default_rng(0))


def good_coco():
    """Two images, a.jpg with a cup and b.jpg with a bag."""
    return {
        "images": [{"id": i, "file_name": f"{'ab'[i]}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(2)],
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(("cup", "bag"))],
        "annotations": [{"id": 100 + i, **note(i, image=i)} for i in range(2)],
    }


def write_coco(root, content):
    for name in "ab":
        picture(root / f"{name}.jpg")
    (root / "x.json").write_text(json.dumps(content))
    return root


NAN = float("nan")


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        *((part, "id", first, rf"{part}\[0\] and {part}\[1\] have the same id, {first}: give each its own")
          for part, first in (("images", 0), ("categories", 10), ("annotations", 100))),
        *((part, "id", value, rf"{part}\[1\], id: must be a whole number or text, found ")
          for part in ("images", "categories", "annotations") for value in (None, True, [1], {}, 1.5, NAN)),
        *(("images", side, value, f"image 1, {side}: must be a whole number from 1 to 1000000000, found ")
          for side in ("height", "width") for value in ("24", 24.5, None, [24], True, 0, -24, NAN, float("inf"), 10**400)),
        *(("images", "file_name", value, "image 1, file_name: must be the name of an image file, found ")
          for value in (None, 5, "", " ", ["b.jpg"])),
        ("images", "file_name", "x" * 300, "image 1, file_name: x* is neither beside the file"),
        ("images", "file_name", "\0", "image 1, file_name: \0 is neither beside the file"),
        *(("categories", "name", value, r"categories\[1\], name: must be text, found ") for value in (None, 7, ["bag"], True)),
        *(("categories", "name", value, r"categories\[1\], name: is empty") for value in ("", "  ", "_", "__ _")),
        *(("categories", "name", value, r"categories\[1\], name: must not contain ") for value in [*MARKS, "[SEG]", "the_[seg]"]),
        *(("annotations", "segmentation", value, "annotation 101, segmentation: must be a list of polygons or an RLE, found ")
          for value in ("abc", 5, True)),
        *(("annotations", "segmentation", value, "annotation 101, segmentation: is empty") for value in ([], {}, None)),
        *(("annotations", "image_id", value, "annotation 101, image_id: there is no ") for value in ("1", None, True, [1], NAN)),
        *(("annotations", "category_id", value, "annotation 101, category_id: there is no ") for value in ("11", {}, 10**400)),
    ],
)  # fmt: skip
def test_fields_of_a_coco_file_that_cannot_be_meant_are_named(tmp_path, capsys, part, field, value, words):
    content = good_coco()
    content[part][1][field] = value
    write_coco(tmp_path, content)
    with pytest.raises(OwnDataError, match=f"x.json cannot be used:\n  {words}"):
        OwnTraining(tmp_path)
    assert check(["--own_data", str(tmp_path)]) == 2
    assert f"broken   {tmp_path}: {tmp_path / 'x.json'}: " in capsys.readouterr().out


@pytest.mark.parametrize("part", ["images", "categories", "annotations"])
@pytest.mark.parametrize("record", [None, 5, "abc", []])
def test_records_of_a_coco_file_that_are_no_objects_are_named(tmp_path, part, record):
    content = good_coco()
    content[part][1] = record
    with pytest.raises(OwnDataError, match=rf"{part}\[1\] must be an object {{...}}, found "):
        OwnTraining(write_coco(tmp_path, content))


def test_a_size_beyond_every_image_is_named(tmp_path):
    content = good_coco()
    content["images"][1] |= {"height": 10**9, "width": 10**9}
    with pytest.raises(OwnDataError, match="image 1, height and width: 1000000000 x 1000000000 are more than"):
        OwnTraining(write_coco(tmp_path, content))


def test_nothing_is_drawn_for_a_size_that_the_image_does_not_have(tmp_path, monkeypatch):
    content = good_coco()
    content["images"][0] |= {"height": 30000, "width": 30000}
    data = OwnEvaluation(write_coco(tmp_path, content), "train", "forced")
    monkeypatch.setattr(own, "draw_segmentation", None)
    with pytest.raises(ValueError, match="image 0, category 'cup': the mask is 30000 high and 30000 wide, but .*a.jpg is 24"):
        data[0]


def test_ids_may_be_text_and_numbers_may_be_floats(tmp_path):
    content = good_coco()
    content["images"][0] |= {"id": "first", "height": 24.0, "width": 32.0, "file_name": ".\\a.jpg"}
    content["annotations"][0] |= {"image_id": "first", "category_id": 10.0, "iscrowd": None}
    data = OwnEvaluation(write_coco(tmp_path, content), "train", "forced")
    assert [data[i].questions for i in range(2)] == [["cup"], ["bag"]] and data[0].masks.any()


def test_backslashes_in_coco_names_are_read_as_slashes(tmp_path):
    content = good_coco()
    content["images"][0]["file_name"] = "shots\\day 1\\a.jpg"
    picture(tmp_path / "images/shots/day 1/a.jpg")
    write_coco(tmp_path, content)
    assert OwnEvaluation(tmp_path, "train", "forced")[0].image_path.endswith("images/shots/day 1/a.jpg")


def test_an_image_that_is_listed_twice_is_one_image(tmp_path):
    """Joined files list it once a class: what one entry shows must not be denied for the other."""
    content = good_coco()
    content["images"][1]["file_name"] = "./a.jpg"
    data = OwnEvaluation(write_coco(tmp_path, content), "train", "generate")
    assert len(data) == 1 and data[0].questions == ["cup", "bag"] and data[0].exists == [True, True]
    content["images"][1]["height"] = 25
    with pytest.raises(OwnDataError, match=r"image 1, height and width: \(25, 32\), but image 0 is the same file"):
        OwnTraining(write_coco(tmp_path, content))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_coco_and_labelme_files_in_unicode_are_read(tmp_path, encoding):
    content = good_coco()
    content["categories"][0]["name"] = "蓝色的杯子"
    write_coco(tmp_path / "coco", content)
    (tmp_path / "coco/x.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    file = labelme(tmp_path / "me/a.json", ("蓝色的杯子", CORNERS)) / "a.json"
    file.write_bytes(json.dumps(json.loads(file.read_text()), ensure_ascii=False).encode(encoding))
    for form in ("coco", "me"):
        assert open_split(tmp_path / form, "train").pictures[0].questions[0].text == "蓝色的杯子"


@pytest.mark.parametrize(("label", "encoding"), [("蓝色的杯子", "gbk"), ("青いカップ", "cp932"), ("míč", "cp1250")])
def test_coco_and_labelme_files_in_another_encoding_are_refused(tmp_path, label, encoding):
    content = good_coco()
    content["categories"][0]["name"] = label
    write_coco(tmp_path / "coco", content)
    (tmp_path / "coco/x.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    file = labelme(tmp_path / "me/a.json", (label, CORNERS)) / "a.json"
    file.write_bytes(json.dumps(json.loads(file.read_text()), ensure_ascii=False).encode(encoding))
    for form in ("coco/x", "me/a"):
        with pytest.raises(ValueError, match=f"{form}.json, line 1: is no UTF-8 text .*save it as UTF-8"):
            OwnTraining(tmp_path / form.split("/")[0])


# ------------------------------------------------------------------------------------------------ LabelMe, ReasonSeg


def test_labels_are_questions_and_their_shapes_one_mask(tmp_path):
    labelme(
        tmp_path / "a.json", ("red_Bag", CORNERS, "polygon"), ("cup", [[30, 20], [20, 10]], "rectangle"),
        ("Red bag", [[14, 12], [14, 16]], "circle"), ("__ignore__", [[22, 12], [25, 12], [25, 15], [22, 15]]),
        imageHeight=HEIGHT, imageWidth=WIDTH,
    )  # fmt: skip
    sample = OwnEvaluation(tmp_path, "train", "generate")[0]
    assert sample.questions == ["red bag", "cup"] and sample.exists == [True, True]
    bag, cup = sample.masks
    assert bag[5, 5] == 1 and bag[12, 14] == 1 and bag[15, 20] == 0 and bag[13, 23] == 255
    assert abs((bag == 1).sum() - 49 - np.pi * 16) < 20
    assert cup[10, 20] == cup[20, 30] == cup[19, 21] == 1 and cup[13, 23] == 255 and (cup > 0).sum() == 121
    drawn = draws(OwnTraining(tmp_path, 2))
    assert all(sample.exists == [True, True] for sample in drawn) and 255 in drawn[0].masks


def test_labelme_pictures_are_found(tmp_path):
    cases = {"old": ("..\\\\shots\\\\x.png", "shots/x.png"), "moved": ("/home/somebody/y.jpg", "notes/y.jpg"),
             "stem": ("nosuch.jpg", "notes/stem.JPG")}  # fmt: skip
    (tmp_path / "notes").mkdir()
    for stem, (named, where) in cases.items():
        picture(tmp_path / where)
        (tmp_path / f"notes/{stem}.json").write_text(
            f'\ufeff{{"shapes": [{{"label": "{stem}", "points": {CORNERS}}}], "imagePath": "{named}", "imageHeight": null}}'
        )
    (tmp_path / "notes/empty.json").write_text('{"shapes": [], "imagePath": "y.jpg"}')
    found = {p.questions[0].text: str(p.path) for p in open_split(tmp_path / "notes", "train").pictures}
    assert set(found) == set(cases)
    assert all(cv2.imread(path) is not None and path.endswith(cases[stem][1].split("/")[1]) for stem, path in found.items())


def test_files_with_a_text_are_reason_seg(tmp_path):
    false = [["Which one flies?", True, "Nothing here flies."], ["a kite", False, "There is no kite."]]
    labelme(tmp_path / "a.json", ("target", CORNERS), ("ignore", [[20, 2], [25, 2], [25, 8]]), ("flag", [[0, 0]]),
            text=["the thing to drink from", "the vessel"], is_sentence=False, false_premise_QA=false)  # fmt: skip
    labelme(tmp_path / "b.json", ("target", CORNERS), text="What holds tea?", is_sentence=True)
    data = OwnTraining(tmp_path)
    drawn = [sample for sample in draws(data, 600) if sample.image_path.endswith("a.jpg")]
    assert 0.1 < np.mean([not sample.exists[0] for sample in drawn]) < 0.2
    assert set(np.unique([sample.masks[0] for sample in drawn if sample.exists[0]])) == {0, 1, 255}
    replies = said(data, 200)
    assert replies["Which one flies?"] == {"Nothing here flies."} and replies["a kite"] == {"There is no kite."}
    assert replies["What holds tea?"] <= set(templates.LONG_ANSWER)
    asked = OwnEvaluation(tmp_path, "train", "generate")
    assert asked[0].exists == [True, True, False, False] and asked[0].meta["is_sentence"] == [False, False, True, False]
    assert len(OwnEvaluation(tmp_path, "train", "forced")[0].questions) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"shapes": [{"label": "cup", "points": [[1, 2]], "shape_type": "point"}]}', r"shapes\[0\]: a point of 1 points"),
        ('{"shapes": [{"label": "cup", "points": []}]}', r"shapes\[0\]: a polygon of 0 points has no area"),
        ('{"shapes": [{"label": "cup"}]}', r"shapes\[0\] lacks the field 'points'"),
        ('{"shapes": [{"label": 7, "points": [[1, 2]]}]}', r"shapes\[0\]: "),
        ('{"shapes": [{"label": " ", "points": [[1, 2]]}]}', "label '': is empty"),
        ('{"shapes": [], "text": "cup"}', "lacks the field 'is_sentence'"),
        ('{"shapes": [], "text": "cup", "is_sentence": false, "false_premise_QA": [["a", false, "[SEG]"]]}', "answer: must not"),
        ('{"shape": []}', "is no LabelMe file: `shapes` must be a list, and it has the fields shape"),
        ("[1]", "is no LabelMe file: .* it has no fields"),
        ("{", "is no JSON"),
    ],
)
def test_faults_of_labelme_files_are_named(tmp_path, content, words):
    labelme(tmp_path / "a.json", ("cup", CORNERS))
    picture(tmp_path / "b.jpg")
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(ValueError, match=f"b.json.*{words}"):
        OwnTraining(tmp_path)
    assert check(["--own_data", str(tmp_path)]) == 2


def png(mask):
    """A mask as LabelMe's AI tools store it."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


RING = np.ones((6, 8), np.uint8)
RING[2:4, 3:6] = 0


def write_shapes(root, *shapes, **fields):
    picture(root / "a.jpg")
    (root / "a.json").write_text(json.dumps({"shapes": shapes, "imagePath": "a.jpg", **fields}))
    return root


@pytest.mark.parametrize("left", [-3, 0, 10, 28, 40])
@pytest.mark.parametrize("top", [-2, 7, 21])
def test_masks_of_labelme_lie_where_their_corners_say(tmp_path, left, top):
    """From the first point to the second, both inclusive, with holes, and cut off where the image ends."""
    corners = [[left, top], [left + 7, top + 5]]
    write_shapes(tmp_path, {"label": "cup", "points": corners, "shape_type": "mask", "mask": png(RING * 255)},
                 {"label": "bag", "points": CORNERS, "shape_type": "polygon"})  # fmt: skip
    data = OwnEvaluation(tmp_path, "train", "forced")[0]
    large = np.zeros((HEIGHT + 40, WIDTH + 40), np.uint8)
    large[top + 10 : top + 16, left + 10 : left + 18] = RING
    expected = large[10 : 10 + HEIGHT, 10 : 10 + WIDTH]
    assert data.questions == (["cup", "bag"] if expected.any() else ["bag"])
    assert np.array_equal(data.masks[0], expected) or not expected.any()


def test_masks_of_labelme_share_the_rules_of_polygons(tmp_path):
    """The shapes of a label are one mask, what is ignored is 255, and what is smaller wins."""
    whole = np.ones((10, 10), bool)
    write_shapes(
        tmp_path,
        {"label": "cup", "points": [[2, 2], [11, 11]], "shape_type": "mask", "mask": png(whole)},
        {"label": "cup", "points": [[20, 3], [25, 3], [25, 8], [20, 8]]},
        {"label": "ignore", "points": [[5, 5], [7, 7]], "shape_type": "mask", "mask": png(whole[:3, :3])},
        {"label": "Ignore", "points": [[0, 0], [30, 0], [30, 20], [0, 20]]},
    )
    mask = OwnEvaluation(tmp_path, "train", "forced")[0].masks[0]
    assert mask[3, 3] == mask[5, 22] == 1 and mask[6, 6] == mask[18, 1] == 255 and mask[22, 1] == 0
    assert (mask == 1).sum() == 100 - 9 + 36


@pytest.mark.parametrize("kind", ["rotation", "oriented_rectangle", "quadrilateral", "rectangle"])
def test_shapes_of_four_corners_are_their_polygons(tmp_path, kind):
    turned = [[10, 2], [18, 8], [12, 16], [4, 10]]
    masks = [
        OwnEvaluation(write_shapes(tmp_path, {"label": "cup", "points": turned, "shape_type": name}), "train", "forced")[0].masks
        for name in ("polygon", kind)
    ]
    assert np.array_equal(*masks) and masks[0].sum() > 80


P4 = CORNERS
BIG = png(np.zeros((9, 9), np.uint8))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        *(({"points": P4[:count], "shape_type": kind}, f"a {kind} of {count} points has no area: use polygons")
          for kind, count in (("point", 1), ("points", 4), ("line", 2), ("linestrip", 4), ("polygon", 2), ("polygon", 1),
                              ("rectangle", 1), ("rectangle", 3), ("circle", 3), ("rotation", 2), ("quadrilateral", 3),
                              ("mask", 4), ("cuboid", 4))),
        *(({"points": P4, "shape_type": kind}, "shape_type must be text, found ") for kind in (3, False, [], {}, 0)),
        *(({"points": P4, "label": label}, "label must be text, found ") for label in (None, 5, ["cup"], True)),
        *(({"points": P4, "label": label}, "label '': is empty") for label in ("", " ")),
        ({"points": P4, "label": "_"}, "label '_': is empty"),
        *(({"points": P4, "label": label}, "label .*: must not contain ") for label in [*MARKS, "[seg]"]),
        ({"label": "cup"}, "lacks the field 'points'"),
        *(({"points": points}, "points: ")
          for points in (None, 5, [1, 2, 3], [[1, 2, 3]], [["a", 2]] * 3, [[NAN, 1]] * 3, [[1e300, 0]] * 3)),
        ({"points": [[10**400, 0]] * 3}, ".*int too large"),
        *(({"points": P4[::2], "shape_type": "mask", "mask": mask}, "mask: must be a PNG in base64, found ")
          for mask in (None, 5, "", "####", "QUJD", [1], BIG[:30])),
        ({"points": P4[::2], "shape_type": "mask"}, "lacks the field 'mask'"),
        ({"points": P4[::2], "shape_type": "mask", "mask": BIG}, "mask: has 9 x 9 pixels, but .* corners of 7 x 7"),
        ({"points": P4[2::-2], "shape_type": "mask", "mask": BIG}, "mask: has 9 x 9 pixels, but .* corners of -5 x"),
    ],
)  # fmt: skip
def test_shapes_of_labelme_that_cannot_be_meant_are_named(tmp_path, capsys, shape, words):
    write_shapes(tmp_path, {"label": "cup", **shape})
    with pytest.raises(OwnDataError, match=rf"a.json, shapes\[0\]:? {words}"):
        OwnTraining(tmp_path)
    assert check(["--own_data", str(tmp_path)]) == 2
    assert str(tmp_path / "a.json") in capsys.readouterr().out


@pytest.mark.parametrize("shape", [None, 5, "cup", [1, 2]])
def test_shapes_that_are_no_objects_are_named(tmp_path, shape):
    with pytest.raises(OwnDataError, match=r"a.json, shapes\[0\]: must be an object {...}, found "):
        OwnTraining(write_shapes(tmp_path, shape))


def test_a_mask_that_is_damaged_behind_its_head_is_named_when_it_is_drawn(tmp_path):
    noise = np.random.default_rng(0).integers(0, 2, (20, 20)).astype(np.uint8) * 255
    cut = base64.b64encode(base64.b64decode(png(noise))[:60]).decode()
    write_shapes(tmp_path, {"label": "cup", "points": [[0, 0], [19, 19]], "shape_type": "mask", "mask": cut})
    with pytest.raises(ValueError, match="a.json, label 'cup': its mask cannot be read"):
        OwnTraining(tmp_path).draw(np.random.default_rng(0))
    assert check(["--own_data", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        *(({name: value, other: 24}, f"a.json, {name}: must be a whole number from 1 to 1000000000, found ")
          for name, other in (("imageHeight", "imageWidth"), ("imageWidth", "imageHeight"))
          for value in ("24", 24.5, -24, 0, True, [24], NAN, 10**400)),
        ({"imageHeight": 10**9, "imageWidth": 10**9}, "a.json, imageHeight and imageWidth: .* are more than"),
        *(({"imagePath": value}, "a.json, imagePath: must be the name of an image file, found ")
          for value in (5, ["a.jpg"], {}, False)),
        *(({"text": value}, "a.json.*") for value in (5, [], [""], {"a": 1}, "cup")),
    ],
)  # fmt: skip
def test_fields_of_labelme_that_cannot_be_meant_are_named(tmp_path, fields, words):
    write_shapes(tmp_path, {"label": "cup", "points": CORNERS}, **fields)
    with pytest.raises(OwnDataError, match=f"cannot be used:\n  .*{words}"):
        OwnTraining(tmp_path)
    assert check(["--own_data", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    "fields",
    [{"imageHeight": 24.0, "imageWidth": 32.0}, {"imageHeight": None, "imageWidth": None}, {"imageHeight": 24},
     {"imagePath": None}, {"imagePath": ""}, {"text": ""}, {"text": None}],
)  # fmt: skip
def test_what_labelme_leaves_open_is_not_missed(tmp_path, fields):
    """AnyLabeling writes an empty `text` into every file, which makes none a ReasonSeg file."""
    data = OwnEvaluation(write_shapes(tmp_path, {"label": "cup", "points": CORNERS}, **fields), "train", "forced")
    assert data[0].questions == ["cup"] and data[0].masks.sum() == 49


def test_labelme_without_pictures_or_labels_or_of_another_size(tmp_path):
    labelme(tmp_path / "a.json", ("cup", CORNERS), imagePath="c.jpg", imageHeight=99, imageWidth=WIDTH)
    with pytest.raises(ValueError, match="label 'cup': the mask is 99 high"):
        OwnTraining(tmp_path).draw(np.random.default_rng(0))
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(OwnDataError, match="a.json, imagePath: neither 'c.jpg' nor a.jpg, .jpeg or .png is there"):
        OwnTraining(tmp_path)
    labelme(tmp_path / "a.json", ("ignore", CORNERS))
    with pytest.raises(OwnDataError, match="no file has a labelled shape"):
        OwnTraining(tmp_path)


# ------------------------------------------------------------------------------------------------ forms and splits


def test_splits_of_sub_folders_columns_and_names(tmp_path):
    for split in ("train", "valid", "test"):
        table(tmp_path / "table" / split, "a.jpg,m.png,cup")
        labelme(table(tmp_path / "labelme" / split).joinpath("x.json"), ("cup", CORNERS))
        (tmp_path / "labelme" / split / "questions.csv").unlink()
        coco(tmp_path / "coco" / split / "_annotations.coco.json", [note(0)])
        picture(tmp_path / "coco" / split / "a.jpg")
        coco(tmp_path / "named" / f"mine-{split}.json", [note(0)])
    picture(tmp_path / "named/images/a.jpg")
    table(tmp_path / "column", "a.jpg,m.png,cup,", "b.jpg,m.png,cup,Valid", "b.jpg,m.png,bag,test",
          header="image,mask,question,split")  # fmt: skip
    for form in ("table", "labelme", "coco", "named", "column"):
        seen = [OwnEvaluation(tmp_path / form, split, "forced")[0] for split in ("train", "val", "test")]
        assert [sample.meta["split"] for sample in seen] == ["train", "val", "test"]
        assert seen[0].image_path != seen[1].image_path or form == "named"
        assert len(OwnTraining(tmp_path / form)) == 1
    (tmp_path / "table/test/questions.csv").unlink()
    with pytest.raises(ValueError, match="no split 'test', only train, val. Sub-folders train, val, test make .*column `split`"):
        OwnEvaluation(tmp_path / "table", "test", "forced")
    table(tmp_path / "table/valid", "a.jpg,m.png,cup,train", header="image,mask,question,split")
    with pytest.raises(OwnDataError, match="line 2, split: 'train', but the table lies in the folder of val"):
        OwnEvaluation(tmp_path / "table", "val", "forced")


def test_without_splits_all_is_train(tmp_path):
    table(tmp_path / "t", "a.jpg,m.png,cup")
    labelme(tmp_path / "x.json", ("cup", CORNERS))
    coco(tmp_path / "c/a.json", [note(0)])
    picture(tmp_path / "c/a.jpg")
    for path in (tmp_path / "t/questions.csv", tmp_path, tmp_path / "c/a.json"):
        assert len(OwnTraining(path)) == len(OwnEvaluation(path, "train", "forced")) == 1
        with pytest.raises(ValueError, match="no split 'val', only train"):
            OwnEvaluation(path, "val", "forced")


def test_captions_beside_coco_instances_are_passed_over(tmp_path):
    """COCO's own folder of annotations holds both, and the captions come first by name."""
    picture(tmp_path / "a.jpg")
    coco(tmp_path / "instances_train.json", [note(0)])
    (tmp_path / "captions_train.json").write_text('{"images": [], "annotations": [{"caption": "a cup"}]}')
    assert len(OwnTraining(tmp_path)) == 1


APPLE = bytes.fromhex("00051607000200004d6163204f5320582020202020202020") + bytes(60)


@pytest.mark.parametrize("form", ["table", "labelme", "coco", "instances"])
@pytest.mark.parametrize("split", ["", "train"])
def test_hidden_files_folders_and_files_of_other_programs_are_passed_over(tmp_path, caplog, form, split):
    folder = tmp_path / split
    if form == "table":
        table(folder, "a.jpg,m.png,cup")
    elif form == "labelme":
        labelme(folder / "b.json", ("cup", CORNERS))
    else:
        coco(folder / {"coco": "coco.json", "instances": "instances_train.json"}[form], [note(0)])
        picture(folder / "a.jpg")
    for name in (".hidden.json", "._a.json", "._b.json", "._instances_train.json", "._questions.csv", "._a.jpg"):
        (folder / name).write_bytes(APPLE)
    for name in ("a.json", "instances_val.json", "b.json.json", "questions.jsonl", "z.jpg"):
        (folder / name).mkdir()
    for name, content in (("0.json", "{}"), ("settings.json", '{"theme": "dark"}'), ("zz.json", "[1, 2]")):
        (folder / name).write_text(content)
    assert len(OwnTraining(tmp_path)) == 1 and check(["--own_data", str(tmp_path)]) == 0
    if form != "instances":  # COCO's own folder, where only these files are looked at
        assert "neither COCO nor LabelMe files: 0.json, settings.json, zz.json" in caplog.text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"settings.json": "{}"}, "settings.json has the fields : it is no COCO file, which has the lists .* no LabelMe file"),
        ({"a.json": '{"images": [], "annotations": []}'}, "a.json has the fields images, annotations: it is no COCO file"),
        ({"a.json": ""}, "a.json is empty"),
        ({"a.json": "{", "b.json": "{}"}, "a.json is no JSON"),
        ({"a.json": "[" * 99999}, "a.json is no usable JSON: .* nested too deeply"),
        ({"a.json": '{"a": ' + "9" * 9999 + "}"}, "a.json is no JSON"),
        ({"a.json": "version https://git-lfs.github.com/spec/v1\n"}, "a.json is a pointer of Git LFS"),
        ({"a.json": "COCO", "b.json": "COCO"}, "holds 2 files .a.json, b.json.: give the path of one"),
        ({"a.json": "COCO", "b.json": "LABELME"}, "holds a.json and b.json: give the path of the file that is meant"),
        ({"a.json": "LABELME", "b.json": "COCO"}, "b.json is a COCO file among LabelMe files"),
        ({"a.json": "LABELME", "b.json": "{"}, "b.json is no JSON"),
        ({"a.json": "{", "b.json": "LABELME"}, "a.json is no JSON"),
        ({"a.json": "COCO", "b.json": "{"}, "b.json is no JSON"),
        ({"questions.csv": HEADER, "b.json": "{"}, "holds questions.csv and b.json"),
        ({"questions.csv": HEADER, "b.json": "LABELME"}, "holds questions.csv and b.json"),
        ({"questions.csv": HEADER, "questions.jsonl": "{}"}, "holds questions.csv and questions.jsonl"),
    ],
)
def test_a_folder_whose_data_cannot_be_told_is_named(tmp_path, capsys, files, words):
    contents = {"COCO": json.dumps(good_coco()), "LABELME": json.dumps({"shapes": [{"label": "c", "points": CORNERS}]})}
    for name in "ab":
        picture(tmp_path / f"images/{name}.jpg")
    for name, content in files.items():
        (tmp_path / name).write_text(contents.get(content, content))
    with pytest.raises(ValueError, match=words):
        OwnTraining(tmp_path)
    assert check(["--own_data", str(tmp_path)]) == 2
    assert "broken " in capsys.readouterr().out


def test_a_split_that_is_no_json_does_not_hide_the_others(tmp_path):
    coco(tmp_path / "mine_train.json", [note(0)])
    picture(tmp_path / "a.jpg")
    (tmp_path / "mine_val.json").write_text('{"images": [')
    assert len(OwnTraining(tmp_path)) == 1
    with pytest.raises(ValueError, match="mine_val.json is no JSON"):
        OwnEvaluation(tmp_path, "val", "forced")


def test_what_is_no_own_data_or_several(tmp_path):
    picture(tmp_path / "pictures/a.jpg"), picture(tmp_path / "pictures/b.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("cup")
    both = table(tmp_path / "both", "a.jpg,m.png,cup")
    coco(both / "a.json", [note(0)])
    labelme(tmp_path / "me/a.json", ("cup", CORNERS))
    for name in ("instances_train", "instances_train2017"):
        coco(tmp_path / f"twice/{name}.json", [note(0)])
    for name in ("a", "b"):
        coco(tmp_path / f"unnamed/{name}.json", [note(0)])
    for name in ("val", "valid"):
        table(tmp_path / "alias" / name, "a.jpg,m.png,cup")
    table(tmp_path / "over", "a.jpg,m.png,cup"), table(tmp_path / "over/train", "a.jpg,m.png,cup")
    for name, words in (
        ("pictures", r"has 2 \.jpg: own data is a folder with questions.csv"),
        ("empty", "has no files: own data is"),
        ("notes.txt", r"has 1 \.txt: own data is"),
        ("both", "holds questions.csv and a.json: give the path of the file that is meant"),
        ("me/a.json", "a.json is no COCO file: .* and has the fields shapes .of LabelMe files give the folder"),
        ("twice", "holds 2 files .instances_train.json, instances_train2017.json.: give the path of one"),
        ("unnamed", "holds 2 files .a.json, b.json.: give the path of one"),
        ("alias", "several data sets .val, valid."),
        ("over", "several data sets .questions.csv, train.: give the path of one, or move"),
    ):
        with pytest.raises(ValueError, match=words):
            OwnTraining(tmp_path / name)
        assert check(["--own_data", str(tmp_path / name)]) == 2
    assert len(OwnTraining(both / "questions.csv")) == len(OwnTraining(both / "a.json")) == 1
    with pytest.raises(FileNotFoundError, match="nosuch does not exist: own data is"):
        OwnTraining(tmp_path / "nosuch")


def test_forced_answers_deny_nothing(tmp_path):
    table(tmp_path, "a.jpg,,cup", "b.jpg,,cup,val", "b.jpg,m.png,bag,val", header="image,mask,question,split")
    assert OwnEvaluation(tmp_path, "val", "forced")[0].questions == ["bag"]
    assert OwnEvaluation(tmp_path, "val", "generate")[0].exists == [False, True]
    with pytest.raises(ValueError, match="nothing that is asked for is there; only the generate protocol"):
        OwnEvaluation(tmp_path, "train", "forced")
    assert OwnTraining(tmp_path).draw(np.random.default_rng(0)).masks.shape == (0, HEIGHT, WIDTH)


# ------------------------------------------------------------------------------------------------ python -m dataset.check


def test_check_counts_own_data_alone_or_beside_the_rest(mini, tmp_path, capsys):
    paths = "||".join(str(mini / form) for form in ("table", "labelme"))
    assert check(["--own_data", paths]) == 0
    out = capsys.readouterr().out
    rows = {tuple(line.split()[1:3]): [int(n) for n in line.split()[3:]] for line in out.splitlines() if line.startswith("own ")}
    pictures = open_split(mini / "table", "train").pictures
    truths = [asked.exists for found in pictures for asked in found.questions]
    assert rows[str(mini / "table"), "train"] == [4, len(truths), sum(truths), len(truths) - sum(truths)]
    assert rows[str(mini / "labelme"), "val"][0] == 3 and "missing" not in out
    assert f"trains   own: {mini / 'table'}, {mini / 'labelme'}" in out
    assert check(["--own_data", str(tmp_path / "nosuch")]) == 1
    assert f"missing  {tmp_path / 'nosuch'}: " in capsys.readouterr().out
    assert check(["--own_data", f"{paths}||{tmp_path / 'nosuch'}"]) == 1  # asked for, and not all there
    assert check(["--own_data", paths, "--dataset", "vqa", "--dataset_dir", str(tmp_path)]) == 1
    assert "missing  llava_instruct_150k" in capsys.readouterr().out


def test_check_tells_of_a_broken_split_and_counts_the_other(tmp_path, capsys):
    coco(tmp_path / "x_train.json", [note(0), note(1, [])])
    coco(tmp_path / "x_val.json", [note(0)])
    picture(tmp_path / "a.jpg")
    assert check(["--own_data", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "x_train.json: annotation 101, segmentation" in out and "trains   nothing" in out
    assert [line.split()[2:] for line in out.splitlines() if line.startswith("own ")] == [
        ["train", "0", "0", "0", "0"], ["val", "1", "1", "1", "0"]
    ]  # fmt: skip


def test_embedded_pictures_are_not_read(tmp_path):
    """LabelMe may store the picture in the file as well; the one on disk is meant."""
    data = base64.b64encode(b"anything").decode()
    labelme(tmp_path / "a.json", ("cup", CORNERS), imageData=data, imagePath="a.jpg")
    assert OwnTraining(tmp_path).draw(np.random.default_rng(0)).image.shape == (HEIGHT, WIDTH, 3)
