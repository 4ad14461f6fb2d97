"""Every reader, fed with damaged files: it refuses with one line that names the file, or gives what an oracle gives.

`READ_FUZZ_CASES=5000 READ_FUZZ_SEED=1 python -m pytest tests/test_fuzz.py` tries more, and others. The oracles are written by
hand and know nothing of the readers: they state what a file means, with json, csv, PIL and pycocotools alone.
"""

import base64
import csv
import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from fuzzing import CASES, damaged, failures, outcome, write
from PIL import Image
from pycocotools import mask as coco
from safetensors.torch import load_file, save_file

HEIGHT, WIDTH = 48, 64
CKPT = Path(__file__).parent / "golden/ckpt"
POLYGON = [8.0, 8.0, 30.0, 8.0, 30.0, 30.0, 8.0, 30.0]
OUTLINE = [[8, 8], [30, 8], [30, 30], [8, 30]]


@dataclass
class Reader:
    """A reader and the file of its format that is damaged."""

    build: Callable[[Path], Path]
    """Writes a whole folder and returns the file to damage."""
    read: Callable[[Path], Any]
    """What the reader makes of that file, as plain values."""
    oracle: Callable[[Path], Any]
    """The same by hand; it may assume that the reader has accepted the file."""
    structured: bool = True
    """The file is JSON, so that values are changed too."""
    also_names: tuple[str, ...] = field(default=())
    """What a message may name instead of the file: something that the file leads to."""


def image(path: Path, seed: int = 0, **options: Any) -> Path:
    """Noise in large cells, of HEIGHT x WIDTH pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((WIDTH, HEIGHT)).save(path, **options)
    return path


def mask(path: Path) -> Path:
    """A box of 16 x 22 pixels."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[8:24, 8:30] = 255
    Image.fromarray(pixels).save(path)
    return path


def content(path: Path) -> Any:
    return json.loads(path.read_bytes().decode("utf-8-sig"))


def words(text: Any) -> str:
    return " ".join(text.split())


def union(segmentations: list[Any]) -> int:
    """Pixels of COCO segmentations together, in HEIGHT x WIDTH; a polygon of fewer than three points is empty."""
    total = np.zeros((HEIGHT, WIDTH), bool)
    for segmentation in segmentations:
        for part in segmentation if isinstance(segmentation, list) else [segmentation]:
            if isinstance(part, list) and len(part) < 6:
                continue
            if isinstance(part, dict) and isinstance(part["counts"], str):
                encoded = part
            elif isinstance(part, dict):
                encoded = coco.frPyObjects(part, HEIGHT, WIDTH)
            else:
                encoded = coco.merge(coco.frPyObjects([part], HEIGHT, WIDTH))
            total |= coco.decode(encoded).astype(bool)
    return int(total.sum())


# ------------------------------------------------------------------------------------------------ own data


def read_own(path: Path) -> Any:
    from dataset.own import open_split, question_mask

    found = []
    for picture in open_split(path, "train").pictures:
        for asked in picture.questions:
            drawn = question_mask(picture, asked, HEIGHT, WIDTH)
            found.append([picture.path.name, asked.text, asked.exists, int((drawn == 1).sum())])
    return sorted(found)


TABLE = (
    "image,mask,question,split,answer\n"
    'a.jpg,m.png,"the blue, round cup",train,\n'
    "b.jpg,m.png,Where does one sit?,,It is [SEG].\n"
    "a.jpg,,the kite,train,There is none.\n"
)


def build_table(folder: Path) -> Path:
    image(folder / "a.jpg"), image(folder / "b.jpg", 1), mask(folder / "m.png")
    (folder / "questions.csv").write_text(TABLE, encoding="utf-8")
    return folder / "questions.csv"


def table_oracle(file: Path) -> Any:
    data = file.read_bytes()
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    if text.lower().startswith("sep="):
        text = text.split("\n", 1)[1]
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows.fieldnames = [name.strip().lower() for name in rows.fieldnames]
    return table_rows(rows)


def table_rows(rows: Any) -> Any:
    found = []
    for row in rows:
        cells = {name: words(value or "") for name, value in row.items()}
        if any(cells.values()) and (cells.get("split") or "train").lower() == "train":
            drawn = 16 * 22 if cells["mask"] else 0
            found.append([Path(cells["image"].replace("\\", "/")).name, cells["question"], bool(cells["mask"]), drawn])
    return sorted(found)


def build_lines(folder: Path) -> Path:
    image(folder / "a.jpg"), mask(folder / "m.png")
    records = [
        {"image": "a.jpg", "mask": "m.png", "question": "the cup", "split": "train"},
        {"image": "a.jpg", "mask": None, "question": "the kite", "correction": "the cup"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder / "questions.jsonl"


def lines_oracle(file: Path) -> Any:
    data = file.read_bytes()
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    records = [json.loads(line) for line in text.split("\n") if line.strip()]
    as_text = [{k.strip().lower(): "" if v is None else str(v) for k, v in record.items()} for record in records if record]
    return table_rows([{"mask": "", **record} for record in as_text])


def build_coco(folder: Path) -> Path:
    image(folder / "a.jpg"), image(folder / "b.jpg", 1)
    rle = coco.encode(np.asfortranarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)))
    compressed = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
    value = {
        "images": [{"id": n, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH} for n, name in enumerate("ab", 1)],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "red_bag"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [POLYGON], "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 1, "segmentation": compressed, "iscrowd": 1},
            {"id": 3, "image_id": 2, "category_id": 2, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [100, 50, 2922]}},
        ],
    }
    (folder / "instances_train.json").write_text(json.dumps(value), encoding="utf-8")
    return folder / "instances_train.json"


def coco_oracle(file: Path) -> Any:
    value = content(file)
    names = {record["id"]: words(record["name"].replace("_", " ")).lower() for record in value["categories"]}
    files = {record["id"]: Path(record["file_name"].replace("\\", "/")).name for record in value["images"]}
    asked: dict[tuple[Any, str], list[Any]] = {}
    for note in value["annotations"]:
        asked.setdefault((note["image_id"], names[note["category_id"]]), []).append(note["segmentation"])
    return sorted([files[number], name, True, union(drawn)] for (number, name), drawn in asked.items())


def build_labelme(folder: Path) -> Path:
    image(folder / "a.jpg")
    value = {
        "version": "5.5.0", "flags": {}, "imagePath": "a.jpg", "imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH,
        "shapes": [
            {"label": "cup", "points": OUTLINE, "shape_type": "polygon"},
            {"label": "Red_Bag", "points": [[35, 5], [60, 40]], "shape_type": "rectangle"},
        ],
    }  # fmt: skip
    (folder / "a.json").write_text(json.dumps(value), encoding="utf-8")
    return folder / "a.json"


def fill(outlines: list[Any]) -> int:
    """Pixels of outlines that are drawn with their edge."""
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    for points in outlines:
        points = np.array(points, float).astype(np.int32).reshape(-1, 1, 2)
        cv2.polylines(drawn, [points], True, 1, 1)
        cv2.fillPoly(drawn, [points], 1)
    return int(drawn.sum())


def labelme_oracle(file: Path) -> Any:
    value = content(file)
    outlines: dict[str, list[Any]] = {}
    for shape in value["shapes"]:
        points = shape["points"]
        if shape.get("shape_type") == "rectangle" and len(points) == 2:
            (left, top), (right, bottom) = points
            points = [[left, top], [right, top], [right, bottom], [left, bottom]]
        outlines.setdefault(words(shape["label"].replace("_", " ")).lower(), []).append(points)
    return sorted(["a.jpg", label, True, fill(shapes)] for label, shapes in outlines.items())


# ------------------------------------------------------------------------------------------------ published formats


def build_reason(folder: Path) -> Path:
    split = folder / "reason_seg/ReasonSeg/train"
    image(split / "a.jpg")
    value = {
        "text": ["Where is the cup?", "What holds tea?"], "is_sentence": True,
        "shapes": [{"label": "target", "points": OUTLINE}, {"label": "flag", "points": [[1, 1]]}],
        "false_premise_QA": [["the kite", False, "There is none."]],
    }  # fmt: skip
    (split / "a.json").write_text(json.dumps(value), encoding="utf-8")
    return split / "a.json"


def read_reason(file: Path) -> Any:
    from dataset.reason_seg import ReasonTraining, draw_mask, read_annotation

    ReasonTraining(file.parents[3])  # opens the split, as training does
    note = read_annotation(file)
    drawn = draw_mask(note.shapes, HEIGHT, WIDTH)
    return [note.texts, note.is_sentence, [list(entry) for entry in note.false_premises], int((drawn == 1).sum())]


def reason_oracle(file: Path) -> Any:
    value = json.loads(decoded(file.read_bytes()))
    texts = [value["text"]] if isinstance(value["text"], str) else value["text"]
    outlines = [shape["points"] for shape in value["shapes"] if shape["label"].lower() != "flag"]
    false = [[query, bool(is_sentence), answer] for query, is_sentence, answer in value.get("false_premise_QA") or []]
    return [texts, bool(value["is_sentence"]), false, fill(outlines)]


def decoded(data: bytes) -> str:
    """UTF-8 or UTF-16 by its mark, else Windows' western encoding."""
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252")


def refcoco_parts() -> tuple[dict, list]:
    instances = {
        "images": [{"id": 7, "file_name": "COCO_7.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "segmentation": [POLYGON]},
            {"id": 2, "image_id": 7, "category_id": 1, "segmentation": [{"size": [HEIGHT, WIDTH], "counts": [10, 5, 3057]}]},
        ],
        "categories": [{"id": 1, "name": "cup"}],
    }
    refs = [
        {"ref_id": 1, "ann_id": 1, "category_id": 1, "image_id": 7, "split": "train",
         "sentences": [{"sent": "the cup", "sent_id": 1, "tokens": ["the", "cup"]}]},
        {"ref_id": 2, "ann_id": 2, "category_id": 1, "image_id": 7, "split": "train",
         "sentences": [{"sent": "left bag", "sent_id": 2, "tokens": ["left", "bag"]}]},
    ]  # fmt: skip
    return instances, refs


def build_instances(folder: Path) -> Path:
    instances, refs = refcoco_parts()
    target = folder / "refer_seg/refcoco"
    target.mkdir(parents=True)
    image(folder / "refer_seg/images/mscoco/images/train2014/COCO_7.jpg")
    (target / "refs(unc_exclude_unified).p").write_bytes(pickle.dumps(refs, protocol=2))
    (target / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    return target / "instances.json"


def read_refcoco(file: Path) -> Any:
    from dataset.refer_api import Refer

    refer = Refer(file.parents[2], "refcoco")
    return [
        [picture.file_name, sentence["sent"], int(refer.mask(sentence["ann_id"], picture.height, picture.width).sum())]
        for picture in refer.of_split("train")
        for sentence in picture.sentences
    ]


def refcoco_oracle(file: Path) -> Any:
    value = content(file.parent / "instances.json")
    refs = pickle.loads((file.parent / "refs(unc_exclude_unified).p").read_bytes())
    images = {record["id"]: record for record in value["images"]}
    notes = {record["id"]: record for record in value["annotations"]}
    found = []
    for ref in refs:
        numbers = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
        drawn = union([notes[number]["segmentation"] for number in numbers if number != -1])
        name = images[ref["image_id"]]["file_name"].replace("\\", "/")
        found += [[name, sentence["sent"], drawn] for sentence in ref["sentences"] if ref["split"] == "train"]
    return found


def build_vqa(folder: Path) -> Path:
    image(folder / "coco/train2017/000000000001.jpg")
    (folder / "llava_dataset").mkdir()
    value = [
        {"id": "1", "image": "000000000001.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cup. "},
            {"from": "human", "value": " And its colour?"}, {"from": "gpt", "value": "Blue."}]},
        {"id": "2", "image": "coco/train2017/000000000001.jpg", "conversations": [
            {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A cup."}]},
    ]  # fmt: skip
    (folder / "llava_dataset/llava_instruct_150k.json").write_text(json.dumps(value), encoding="utf-8")
    return folder / "llava_dataset/llava_instruct_150k.json"


def read_vqa(file: Path) -> Any:
    from dataset.vqa import read_dialogues

    found = read_dialogues(file)
    return [[dialogue.image, [list(turn) for turn in dialogue.turns]] for dialogue in found.usable]


MARKS = ("[seg]", "<im_start>", "<im_end>", "</s>", "<s>", "<unk>")


def vqa_oracle(file: Path) -> Any:
    """The dialogues that follow the format; all others are left out."""
    text = decoded(file.read_bytes())
    try:
        records = json.loads(text)
    except ValueError:
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    found = []
    for record in records:
        try:
            folders, _, name = record["image"].removeprefix("./").replace("\\", "/").rpartition("/")
            said = [(turn["from"], turn["value"]) for turn in record["conversations"]]
            said = said[1:] if said[0][0] == "gpt" else said
            texts = [value for _, value in said]
            usable = (
                folders in ("", "train2017", "coco/train2017") and name not in ("", ".", "..") and len(name.encode()) <= 255
                and "\x00" not in name and said and [who for who, _ in said] == ["human", "gpt"] * (len(said) // 2)
                and not any("<image>" in value for value in texts[1:])
            )  # fmt: skip
            if usable and "<image>" in texts[0]:
                texts[0] = texts[0].replace("<image>", "").strip()
            usable = usable and all(value.strip() and is_text(value) for value in texts)
        except (TypeError, KeyError, AttributeError, IndexError):
            continue
        if usable:
            found.append([name, [list(turn) for turn in zip(texts[::2], texts[1::2], strict=True)]])
    return found


def is_text(value: str) -> bool:
    """No mark of a prompt, and no control character besides blanks."""
    marked = any(mark in value.lower() for mark in MARKS) or "ASSISTANT:" in value or "<image>" in value.lower()
    return not marked and not any(ord(c) < 32 and c not in "\t\n\r" or ord(c) == 127 for c in value)


def build_parts(folder: Path) -> Path:
    target = folder / "vlpart/pascal_part"
    image(target / "VOCdevkit/VOC2010/JPEGImages/a.jpg")
    value = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "dog:head"}, {"id": 2, "name": "dog:tail"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [POLYGON], "area": 5, "iscrowd": 0}],
    }
    (target / "train.json").write_text(json.dumps(value), encoding="utf-8")
    return target / "train.json"


def read_parts(file: Path) -> Any:
    from dataset.sem_seg import SOURCES

    source = SOURCES["pascal_part"](file.parents[2])
    found = [source.content(index, np.random.default_rng(0)) for index in range(len(source))]
    return [[content.path.name, sorted(int(draw().sum()) for _, draw in content.present)] for content in found]


def parts_oracle(file: Path) -> Any:
    value = content(file)
    found = []
    for record in value["images"]:
        drawn = [note["segmentation"] for note in value["annotations"] if note["image_id"] == record["id"]]
        if drawn:
            found.append([Path(record["file_name"]).name, sorted(union([segmentation]) for segmentation in drawn)])
    return found


def build_mapillary(folder: Path) -> Path:
    target = folder / "mapillary"
    image(target / "training/images/a.jpg")
    (target / "training/v2.0/labels").mkdir(parents=True)
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(target / "training/v2.0/labels/a.png")
    value = {"labels": [{"name": "object--car", "readable": "Car"}, {"name": "nature--sky", "readable": "Sky"}]}
    (target / "config_v2.0.json").write_text(json.dumps(value), encoding="utf-8")
    return target / "config_v2.0.json"


def read_mapillary(file: Path) -> Any:
    from dataset.sem_seg import SOURCES

    source = SOURCES["mapillary"](file.parents[1])
    return [list(source.classes), [name for name, _ in source.content(0, np.random.default_rng(0)).present]]


def mapillary_oracle(file: Path) -> Any:
    names = [label["readable"].lower() for label in content(file)["labels"]]
    return [names, names[:1]]


# ------------------------------------------------------------------------------------------------ images


def read_pixels(file: Path) -> Any:
    from utils.image import read_image

    return read_image(file).tobytes()


def pixels_oracle(file: Path) -> Any:
    with Image.open(file) as opened:
        return np.asarray(opened.convert("RGB")).tobytes()


def read_mask_file(file: Path) -> Any:
    from dataset.own import read_mask

    return read_mask(file).tobytes()


def mask_oracle(file: Path) -> Any:
    with Image.open(file) as opened:
        return (np.asarray(opened) != 0).astype(np.uint8).tobytes()


def read_labels(file: Path) -> Any:
    from dataset.sem_seg import LabelMaps

    return LabelMaps([(file, file)], ["a", "b"]).labels(file).tobytes()


def labels_oracle(file: Path) -> Any:
    with Image.open(file) as opened:
        return np.asarray(opened).tobytes()


def build_labels(folder: Path) -> Path:
    labels = np.random.default_rng(0).integers(0, 2, (HEIGHT, WIDTH), dtype=np.uint8)
    Image.fromarray(labels).save(folder / "labels.png")
    return folder / "labels.png"


# ------------------------------------------------------------------------------------------------ results and runs


def build_predictions(folder: Path) -> Path:
    rle = coco.encode(np.asfortranarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)))
    half = coco.encode(np.asfortranarray(np.tri(HEIGHT, WIDTH, dtype=np.uint8)))
    encoded = [{"size": [HEIGHT, WIDTH], "counts": r["counts"].decode()} for r in (rle, half)]
    records = [
        {"image_index": n // 2, "question_index": n % 2, "image": "a.jpg", "question": "the cup", "prompt": "the cup?",
         "answer": "It is [SEG].", "exists": True, "predicted_exists": bool(n % 2), "mask": encoded[n % 2], "target": encoded[1]}
        for n in range(4)
    ]  # fmt: skip
    file = folder / "predictions_refcoco_val.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def read_predictions_file(file: Path) -> Any:
    from utils.predictions import expressions, read_predictions

    return [[row.image, row.intersection, row.union] for row in expressions(read_predictions(file))]


def predictions_oracle(file: Path) -> Any:
    found = []
    for line in file.read_bytes().decode("utf-8-sig").split("\n"):
        if line.strip():
            record = json.loads(line)
            predicted, true = (coco.decode(record[name]).astype(bool) for name in ("mask", "target"))
            if record.get("ignored"):
                keep = ~coco.decode(record["ignored"]).astype(bool)
                predicted, true = predicted & keep, true & keep
            found.append([record["image_index"], int((predicted & true).sum()), int((predicted | true).sum())])
    return found


def build_run(folder: Path) -> Path:
    from utils.args import TrainArgs

    TrainArgs(exp_name="x").save(folder / "config.json")
    return folder / "config.json"


def read_run(file: Path) -> Any:
    from utils.args import TrainArgs

    return dict(vars(TrainArgs.load(file.parent)))


def run_oracle(file: Path) -> Any:
    from utils.args import TrainArgs

    value = content(file)["train"]
    return {**vars(TrainArgs()), **value, "exp_name": value.get("exp_name") or value.get("preset") or "read_referseg"}


# ------------------------------------------------------------------------------------------------ checkpoints


def build_checkpoint(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        for file in (CKPT / "read_tiny").iterdir():
            if file.name == name:
                shutil.copy(file, folder / name)
            else:
                (folder / file.name).symlink_to(file)
        return folder / name

    return build


def read_small_files(file: Path) -> Any:
    """What of a checkpoint is read before its weights: ids of the tokens, and the sizes in its config."""
    from model import READProcessor
    from model.checkpoint import read_config

    processor = READProcessor.from_pretrained(file.parent, vision_tower=CKPT / "clip_tiny")
    config = read_config(file.parent, SHAPES, SAM_SHAPES, CKPT / "clip_tiny")
    return [[part.seg_token_id, part.im_start_id, part.im_end_id] for part in (processor, config)]


def small_files_oracle(file: Path) -> Any:
    """Whatever else was changed: the three tokens are the same for processor and model, and are those of the added tokens."""
    added = content(file.parent / "added_tokens.json")
    return [[added["[SEG]"], added["<im_start>"], added["<im_end>"]]] * 2


SHAPES: dict[str, tuple[int, ...]] = {}
SAM_SHAPES: dict[str, tuple[int, ...]] = {}


@pytest.fixture(scope="module", autouse=True)
def shapes():
    """Shapes of the tiny checkpoint, read once."""
    weights = torch.load(CKPT / "read_tiny/pytorch_model.bin", map_location="cpu", weights_only=True)
    SHAPES.update({key: tuple(tensor.shape) for key, tensor in weights.items()})
    prefix = "model.visual_model."
    SAM_SHAPES.update({key.removeprefix(prefix): shape for key, shape in SHAPES.items() if key.startswith(prefix)})


WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.ones(5)}


def build_safetensors(folder: Path) -> Path:
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder / "model.safetensors"


def build_bin(folder: Path) -> Path:
    torch.save(WEIGHTS, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def read_weights(file: Path) -> Any:
    from model.checkpoint import read_tensors

    return sorted((key, tensor.numpy().tobytes()) for key, tensor in read_tensors([file]))


def safetensors_oracle(file: Path) -> Any:
    return sorted((key, tensor.numpy().tobytes()) for key, tensor in load_file(file).items())


def bin_oracle(file: Path) -> Any:
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return sorted((key, tensor.numpy().tobytes()) for key, tensor in loaded.items())


def build_index(folder: Path) -> Path:
    save_file(WEIGHTS, folder / "model-00001-of-00001.safetensors")
    value = {"metadata": {"total_size": 68}, "weight_map": dict.fromkeys(WEIGHTS, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(value), encoding="utf-8")
    return folder / "model.safetensors.index.json"


def read_index(file: Path) -> Any:
    from model.checkpoint import weight_files

    return [found.name for found in weight_files(file.parent)]


def index_oracle(file: Path) -> Any:
    return sorted(set(content(file)["weight_map"].values()))


AI_MASK = io.BytesIO()
Image.fromarray(np.ones((12, 16), bool)).save(AI_MASK, "PNG")


def build_ai_mask(folder: Path) -> Path:
    file = build_labelme(folder)
    value = json.loads(file.read_text(encoding="utf-8"))
    value["shapes"] = [{"label": "cup", "shape_type": "mask", "points": [[8, 8], [23, 19]],
                        "mask": base64.b64encode(AI_MASK.getvalue()).decode()}]  # fmt: skip
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def ai_mask_oracle(file: Path) -> Any:
    found: dict[str, Any] = {}
    for shape in content(file)["shapes"]:
        drawn = found.setdefault(words(shape["label"].replace("_", " ")).lower(), np.zeros((HEIGHT, WIDTH), np.uint8))
        if shape.get("shape_type") != "mask":
            points = np.array(shape["points"], float).astype(np.int32).reshape(-1, 1, 2)
            cv2.polylines(drawn, [points], True, 1, 1)
            cv2.fillPoly(drawn, [points], 1)
            continue
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as opened:
            stored = np.asarray(opened) != 0
        left, top = (int(v) for v in shape["points"][0])
        y, x = np.nonzero(stored)
        inside = (y + top >= 0) & (y + top < HEIGHT) & (x + left >= 0) & (x + left < WIDTH)
        drawn[y[inside] + top, x[inside] + left] = 1
    return sorted(["a.jpg", label, True, int(drawn.sum())] for label, drawn in found.items())


READERS = {
    "own table": Reader(build_table, lambda f: read_own(f.parent), table_oracle, structured=False),
    "own JSON lines": Reader(build_lines, lambda f: read_own(f.parent), lines_oracle, structured=False),
    "own COCO": Reader(build_coco, lambda f: read_own(f.parent), coco_oracle),
    "own LabelMe": Reader(build_labelme, lambda f: read_own(f.parent), labelme_oracle, also_names=(" cannot be used",)),
    "own LabelMe masks": Reader(build_ai_mask, lambda f: read_own(f.parent), ai_mask_oracle, also_names=(" cannot be used",)),
    "ReasonSeg": Reader(build_reason, read_reason, reason_oracle),
    "RefCOCO instances": Reader(build_instances, read_refcoco, refcoco_oracle, also_names=("refs(", "COCO_7")),
    "RefCOCO refs": Reader(lambda f: build_instances(f).with_name("refs(unc_exclude_unified).p"), read_refcoco, refcoco_oracle,
                           structured=False, also_names=("instances.json",)),
    "LLaVA-Instruct": Reader(build_vqa, read_vqa, vqa_oracle),
    "PASCAL-Part": Reader(build_parts, read_parts, parts_oracle),
    "Mapillary": Reader(build_mapillary, read_mapillary, mapillary_oracle, also_names=("a.png",)),
    "JPEG": Reader(lambda f: image(f / "a.jpg", quality=90), read_pixels, pixels_oracle, structured=False),
    "PNG": Reader(lambda f: image(f / "a.png"), read_pixels, pixels_oracle, structured=False),
    "mask": Reader(lambda f: mask(f / "m.png"), read_mask_file, mask_oracle, structured=False),
    "label map": Reader(build_labels, read_labels, labels_oracle, structured=False),
    "predictions": Reader(build_predictions, read_predictions_file, predictions_oracle, structured=False),
    "settings of a run": Reader(build_run, read_run, run_oracle, also_names=("--",)),
    "config.json": Reader(build_checkpoint("config.json"), read_small_files, small_files_oracle),
    "added_tokens.json": Reader(build_checkpoint("added_tokens.json"), read_small_files, small_files_oracle),
    "tokenizer_config.json": Reader(build_checkpoint("tokenizer_config.json"), read_small_files, small_files_oracle),
    "tokenizer.model": Reader(build_checkpoint("tokenizer.model"), read_small_files, small_files_oracle, structured=False,
                              also_names=("added_tokens.json",)),
    "safetensors": Reader(build_safetensors, read_weights, safetensors_oracle, structured=False),
    "bin": Reader(build_bin, read_weights, bin_oracle, structured=False),
    "index of shards": Reader(build_index, read_index, index_oracle),
}  # fmt: skip


def lines_of_json(data: bytes, number: int) -> bytes:
    """A file of JSON lines with one line damaged as a JSON file of its own."""
    lines = data.splitlines(keepends=True)
    place = number % len(lines)
    lines[place] = damaged(lines[place], number, structured=True).rstrip(b"\n") + b"\n"
    return b"".join(lines)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_by_name_or_read_as_it_says(name, tmp_path):
    reader = READERS[name]
    file = reader.build(tmp_path)
    whole = file.read_bytes()
    assert reader.read(file) == reader.oracle(file)  # the file itself

    def case(number: int) -> str | None:
        in_lines = file.suffix == ".jsonl" and number % 3
        write(file, lines_of_json(whole, number) if in_lines else damaged(whole, number, reader.structured))
        return outcome(lambda: reader.read(file), lambda: reader.oracle(file), (file.name, *reader.also_names))

    assert failures(case, CASES) == []
