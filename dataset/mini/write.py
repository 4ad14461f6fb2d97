"""Writes the mini world in the formats of ReasonSeg, RefCOCO, FP-RefCOCO, LLaVA-Instruct, the semantic sets (§2) and own data.

    reason_seg/ReasonSeg/{train,val,test}/*.jpg + *.json
    refer_seg/{refcoco,fprefcoco}/{instances.json, refs(<splitBy>).p}, and all others of the family, small
    refer_seg/images/mscoco/images/train2014/COCO_train2014_*.jpg, refer_seg/images/saiapr_tc-12/*/images/*.jpg
    llava_dataset/llava_instruct_150k.json, coco/train2017/*.jpg
    ade20k, cocostuff, mapillary (label maps), vlpart/{pascal_part,paco} (objects and parts)
    own/{table,coco,labelme}: own data in its three forms (dataset/own.py)

The same bytes for the same seed. Training scenes use the training photographs, all others the test photographs, and every
split has seeds of its own.
"""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ..refer_api import SPLIT_BY
from ..sem_seg import CLASSES
from . import world
from .phrases import NAMES

IGNORE_SHARE = 0.2
"""ReasonSeg files that leave one other thing out of the measure."""
CATEGORIES = {name: i + 1 for i, name in enumerate(NAMES)}
SPLITS = ("train", "val", "test", "testA", "testB")
FAMILIES = (
    "reason_seg", "refcoco", "fprefcoco", "vqa", "sem_seg", "refclef", "refcoco+", "refcocog", "R-refcoco",
    "own/table", "own/coco", "own/labelme", "R-refcoco+", "R-refcocog", "fprefcoco+", "fprefcocog",
)  # fmt: skip


def _rng(seed: int, family: str, split: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, FAMILIES.index(family), SPLITS.index(split), number])


def _photos(split: str) -> str:
    return "train" if split == "train" else "test"


def _scene(rng: np.random.Generator, split: str, usable: Callable[[world.Scene], bool]) -> world.Scene:
    """The first scene of the generator that can be used."""
    while not usable(scene := world.make_scene(rng, _photos(split))):
        pass
    return scene


def _write_jpeg(file: Path, image: np.ndarray) -> None:
    # Not imwrite, which is silent about a full disk.
    file.write_bytes(cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1])


def polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines (n, 2) of each piece of a mask, in pixels; specks that are no polygon are left out."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [contour[:, 0] for contour in contours if len(contour) >= 4]


# ------------------------------------------------------------------------------------------------ ReasonSeg


def write_reason_seg(root: Path, seed: int, counts: dict[str, int]) -> None:
    """`counts` pictures a split: questions that need a step, polygons, ignored regions, false premises."""
    for split, count in counts.items():
        folder = root / "reason_seg/ReasonSeg" / split
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = _rng(seed, "reason_seg", split, number)
            scene = _scene(rng, split, lambda scene: True)
            asked = world.reasoning(scene, rng)
            first = asked[rng.integers(len(asked))]
            # A file has one kind of question and one mask: other wordings of the same thing go into the same file.
            same = [first.text]
            for _ in range(8):
                same += [a.text for a in world.reasoning(scene, rng)
                         if a.targets == first.targets and a.is_sentence == first.is_sentence]  # fmt: skip
            texts = list(dict.fromkeys(same))[: 1 if split != "train" else 3]
            shapes = [_shape("target", outline) for t in first.targets for outline in polygons(scene.things[t].mask)]
            others = [i for i in range(len(scene.things)) if i not in first.targets]
            if others and rng.random() < IGNORE_SHARE:
                left_out = scene.things[others[rng.integers(len(others))]]
                shapes += [_shape("ignore", outline) for outline in polygons(left_out.mask)]
            content = {
                "text": texts,
                "is_sentence": first.is_sentence,
                "shapes": shapes,
                "false_premise_QA": [list(entry) for entry in world.false_reasoning(scene, rng)[:2]],
            }
            _write_jpeg(folder / f"mini_{split}_{number:04d}.jpg", scene.image)
            (folder / f"mini_{split}_{number:04d}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _shape(label: str, outline: np.ndarray) -> dict:
    return {"label": label, "points": outline.astype(float).tolist(), "shape_type": "polygon"}


# ------------------------------------------------------------------------------------------------ RefCOCO, FP-RefCOCO


def write_refer(root: Path, seed: int, family: str, counts: dict[str, int], first_image: int) -> int:
    """One data set of the refer family; returns the image id after its last."""
    images = root / "refer_seg/images" / ("saiapr_tc-12" if family == "refclef" else "mscoco/images/train2014")
    folder = root / "refer_seg" / family
    folder.mkdir(parents=True, exist_ok=True)
    instances: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name, "supercategory": "clothes"} for name, number in CATEGORIES.items()],
    }
    refs: list[dict] = []
    image_id, sent_id = first_image, 0
    for split, count in counts.items():
        for number in range(count):
            rng = _rng(seed, family, split, number)
            scene = _scene(rng, split, lambda scene: bool(_said(scene, np.random.default_rng(0), family)))
            height, width = scene.image.shape[:2]
            file_name = f"COCO_train2014_{image_id:012d}.jpg"
            if family == "refclef":
                file_name = f"{image_id % 40:02d}/images/{image_id}.jpg"
            (images / file_name).parent.mkdir(parents=True, exist_ok=True)
            _write_jpeg(images / file_name, scene.image)
            instances["images"].append({"id": image_id, "file_name": file_name, "height": height, "width": width})
            first_annotation = len(instances["annotations"]) + 1
            for thing in scene.things:
                note = _annotation(thing, image_id, len(instances["annotations"]) + 1, rng)
                if isinstance(note["segmentation"], dict):  # REFER has a list with one RLE an annotation
                    note["segmentation"] = [note["segmentation"]]
                instances["annotations"].append(note)
            ways: dict[int, dict[str, str]] = {}
            for found in _said(scene, rng, family):
                ways.setdefault(found.target, {})[found.kind] = found.text
            # Two ways of naming each thing: by attributes, as an extreme, by a relation, with even odds.
            said = {
                target: [{"sent": of_kind[kind]} for kind in rng.permutation(sorted(of_kind))[:2]]
                for target, of_kind in ways.items()
            }
            if family.startswith(("fp", "R-")):
                said = _with_false_premises(scene, rng, said, family)
            for target, sentences in sorted(said.items()):
                for sentence in sentences:
                    sentence |= {"raw": sentence["sent"], "tokens": sentence["sent"].split(), "sent_id": sent_id}
                    sent_id += 1
                refs.append(
                    {
                        "ref_id": len(refs),
                        "ann_id": first_annotation + target,
                        "category_id": CATEGORIES[scene.things[target].name],
                        "image_id": image_id,
                        "file_name": file_name,
                        "split": split,
                        "sentences": sentences,
                        "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    }
                )
            image_id += 1
    (folder / "instances.json").write_text(json.dumps(instances) + "\n", encoding="utf-8")
    (folder / f"refs({SPLIT_BY[family]}).p").write_bytes(pickle.dumps(refs, protocol=2))
    return image_id


def _annotation(thing: world.Thing, image_id: int, number: int, rng: np.random.Generator) -> dict:
    """COCO annotation: polygons, or for one in five a compressed RLE."""
    x0, y0, x1, y1 = thing.box
    if rng.random() < 0.2:
        rle = coco_mask.encode(np.asfortranarray(thing.mask.astype(np.uint8)))
        segmentation: dict | list = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    else:
        segmentation = [outline.astype(float).flatten().tolist() for outline in polygons(thing.mask)]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORIES[thing.name],
        "segmentation": segmentation,
        "area": int(thing.mask.sum()),
        "bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1],
        "iscrowd": 0,
    }


def _said(scene: world.Scene, rng: np.random.Generator, family: str) -> list[world.Expression]:
    """What a set says of a scene: RefCOCO+ speaks of no places, RefCOCOg at length."""
    found = world.expressions(scene, rng)
    if family.endswith("refcoco+"):
        return [e for e in found if e.kind not in ("extreme", "relation")]
    return [e for e in found if len(e.text.split()) > 2] if family.endswith("refcocog") else found


def _with_false_premises(
    scene: world.Scene, rng: np.random.Generator, said: dict[int, list[dict]], family: str
) -> dict[int, list[dict]]:
    """One true expression a thing, and about as many false ones; FP sets give each the true one nearest to it."""
    corrects = family.startswith("fp")
    true = {"is_false_premise": False, "gt_sent": ""} if corrects else {"exist": True}
    out = {target: [{**sentence, **true} for sentence in sentences[:1]] for target, sentences in said.items()}
    targets = list(out)
    wanted = sum(map(len, out.values()))
    for number, false in enumerate(world.false_premises(scene, rng)[:wanted]):
        mark = {"is_false_premise": True, "gt_sent": false.correction} if corrects else {"exist": False}
        out[targets[number % len(targets)]].append({"sent": false.text, **mark})
    return out


# ------------------------------------------------------------------------------------------------ LLaVA-Instruct


def write_vqa(root: Path, seed: int, count: int) -> None:
    """`count` pictures with a dialogue of up to three turns about them, none of which wants a mask."""
    images = root / "coco/train2017"
    images.mkdir(parents=True, exist_ok=True)
    (root / "llava_dataset").mkdir(parents=True, exist_ok=True)
    items = []
    for number in range(count):
        rng = _rng(seed, "vqa", "train", number)
        scene = _scene(rng, "train", lambda scene: True)
        _write_jpeg(images / f"{number:012d}.jpg", scene.image)
        talk = world.small_talk(scene, rng)[: rng.integers(1, 4)]
        said = []
        for question, answer in talk:
            said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        said[0]["value"] = "<image>\n" + said[0]["value"] if rng.random() < 0.5 else said[0]["value"] + "\n<image>"
        items.append({"id": f"{number:012d}", "image": f"{number:012d}.jpg", "conversations": said})
    (root / "llava_dataset/llava_instruct_150k.json").write_text(json.dumps(items, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ semantic sets

ADE20K = {"bag": "bag"}
"""What ADE20K calls our things; the rest is apparel."""
COCOSTUFF = {"bag": "handbag", "boot": "shoe", "sandal": "shoe", "sneaker": "shoe"}
"""What COCO-Stuff calls them; the rest are clothes."""
PARTS = ("upper half", "lower half")


def write_sem_seg(root: Path, seed: int, count: int) -> None:
    """`count` pictures for each of the five semantic sets, in their three kinds of label maps and two of COCO files."""
    ade20k, cocostuff = ((CLASSES / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in ("ade20k", "cocostuff"))
    mapillary = list(NAMES)
    for number, folder in enumerate(("ade20k", "cocostuff", "mapillary")):
        for i in range(count):
            rng = _rng(seed, "sem_seg", "train", 1000 * number + i)
            scene = _scene(rng, "train", lambda scene: True)
            names = [thing.name for thing in scene.things]
            if folder == "ade20k":  # 0 is nothing, classes count from 1
                values = [ade20k.index(ADE20K.get(name, "apparel")) + 1 for name in names]
                file, image = (root / f"ade20k/{kind}/training/ADE_train_{i:08d}" for kind in ("annotations", "images"))
            elif folder == "cocostuff":
                values = [cocostuff.index(COCOSTUFF.get(name, "clothes")) for name in names]
                file, image = (root / f"{kind}/train2017/{500_000 + i:012d}" for kind in ("cocostuff", "coco"))
            else:
                values = [mapillary.index(name) for name in names]
                file, image = (root / f"mapillary/training/{kind}/mini_{i:04d}" for kind in ("v2.0/labels", "images"))
            labels = np.full(scene.image.shape[:2], 0 if folder == "ade20k" else 255, np.uint8)
            for value, thing in zip(values, scene.things, strict=True):
                labels[thing.mask] = value
            for path in (file, image):
                path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(labels)
            if folder == "mapillary":  # a palette, as the real files have
                picture.putpalette([int(value) for value in np.arange(768) * 37 % 256])
            picture.save(file.with_suffix(".png"))
            _write_jpeg(image.with_suffix(".jpg"), scene.image)
    config = {"labels": [{"name": f"object--{name}", "readable": name.capitalize()} for name in mapillary]}
    (root / "mapillary/config_v2.0.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    _write_parts(root, seed, count, "pascal_part")
    _write_parts(root, seed, count, "paco_lvis")


def _write_parts(root: Path, seed: int, count: int, name: str) -> None:
    """PASCAL-Part has parts alone, `bag:upper half`; PACO has objects too, and what a name means behind `_(`."""
    paco = name == "paco_lvis"
    objects = [f"{thing}_(clothes)" if paco else thing for thing in NAMES]
    names = [*objects, *(f"{thing}:{part}" for thing in objects for part in PARTS)] if paco else [
        f"{thing}:{part}" for thing in objects for part in PARTS]  # fmt: skip
    categories = [{"id": number, "name": category} for number, category in enumerate(names, start=1)]
    ids = {category["name"]: category["id"] for category in categories}
    folder = root / ("vlpart/paco/annotations" if paco else "vlpart/pascal_part")
    image_dir = root / ("coco/train2017" if paco else "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages")
    content: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
    for made in (folder, image_dir):
        made.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = _rng(seed, "sem_seg", "train", 1000 * (4 if paco else 3) + i)
        scene = _scene(rng, "train", lambda scene: True)
        file_name = f"{600_000 + i:012d}.jpg" if paco else f"2010_{i:06d}.jpg"
        _write_jpeg(image_dir / file_name, scene.image)
        height, width = scene.image.shape[:2]
        stored = f"train2017/{file_name}" if paco else file_name
        content["images"].append({"id": i + 1, "file_name": stored, "height": height, "width": width})
        for thing in scene.things:
            what = objects[list(NAMES).index(thing.name)]
            upper = thing.mask & (np.arange(height)[:, None] < thing.centre[1])
            shown = [(f"{what}:{part}", mask) for part, mask in zip(PARTS, (upper, thing.mask & ~upper), strict=True)]
            for category, mask in [(what, thing.mask), *shown] if paco else shown:
                part = world.Thing(thing.name, thing.colour, thing.size, mask)
                annotation = _annotation(part, i + 1, len(content["annotations"]) + 1, rng)
                content["annotations"].append({**annotation, "category_id": ids[category]})
    file = folder / ("paco_lvis_v1_train.json" if paco else "train.json")
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ own data


def write_own(root: Path, seed: int, counts: dict[str, int]) -> None:
    """`counts` pictures a split in each of the three forms of own data."""
    _write_table(root / "own/table", seed, counts)
    _write_coco(root / "own/coco", seed, counts)
    for split, count in counts.items():
        folder = root / "own/labelme" / split
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = _rng(seed, "own/labelme", split, number)
            scene = _scene(rng, split, lambda scene: True)
            labels = [f"{thing.colour} {thing.name}" for thing in scene.things]
            if len(labels) > 3:  # somebody could not tell what this is
                labels[-1] = "__ignore__"
            shapes = [_shape(label, outline) for label, thing in zip(labels, scene.things, strict=True)
                      for outline in polygons(thing.mask)]  # fmt: skip
            content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"{number:04d}.jpg", "imageData": None,
                       "imageHeight": scene.image.shape[0], "imageWidth": scene.image.shape[1]}  # fmt: skip
            _write_jpeg(folder / f"{number:04d}.jpg", scene.image)
            (folder / f"{number:04d}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_table(folder: Path, seed: int, counts: dict[str, int]) -> None:
    """questions.csv: phrases, questions that need a step, false premises with their correction or their answer."""
    for made in ("pictures", "masks"):
        (folder / made).mkdir(parents=True, exist_ok=True)
    columns = ("image", "mask", "question", "is_sentence", "answer", "correction", "split")
    rows: list[dict] = []
    for split, count in counts.items():
        for number in range(count):
            rng = _rng(seed, "own/table", split, number)
            scene = _scene(rng, split, lambda scene: bool(world.expressions(scene, np.random.default_rng(0))))
            image = f"pictures/{split}_{number:04d}.jpg"
            _write_jpeg(folder / image, scene.image)
            asked = [(e.text, False, [e.target]) for e in world.expressions(scene, rng)[:2]]
            asked += [(r.text, r.is_sentence, r.targets) for r in world.reasoning(scene, rng)[:1]]
            for i, (text, is_sentence, targets) in enumerate(asked):
                mask = f"masks/{split}_{number:04d}_{i}.png"
                shown = np.any([scene.things[target].mask for target in targets], axis=0)
                Image.fromarray(shown.astype(np.uint8) * 255).save(folder / mask)
                rows.append({"image": image, "mask": mask, "question": text, "is_sentence": is_sentence, "split": split})
            rows += [{"image": image, "question": false.text, "correction": false.correction, "split": split}
                     for false in world.false_premises(scene, rng)[:1]]  # fmt: skip
            rows += [{"image": image, "question": text, "is_sentence": is_sentence, "answer": answer, "split": split}
                     for text, is_sentence, answer in world.false_reasoning(scene, rng)[:1]]  # fmt: skip
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_coco(folder: Path, seed: int, counts: dict[str, int]) -> None:
    """instances_<split>.json beside `images`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        content: dict[str, list] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": name} for name, number in CATEGORIES.items()],
        }
        for number in range(count):
            rng = _rng(seed, "own/coco", split, number)
            scene = _scene(rng, split, lambda scene: True)
            file_name, (height, width) = f"{split}_{number:04d}.jpg", scene.image.shape[:2]
            _write_jpeg(folder / "images" / file_name, scene.image)
            content["images"].append({"id": number + 1, "file_name": file_name, "height": height, "width": width})
            for thing in scene.things:
                content["annotations"].append(_annotation(thing, number + 1, len(content["annotations"]) + 1, rng))
        (folder / f"instances_{split}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_all(root: Path, seed: int = 0, train: int = 600, val: int = 80, test: int = 60) -> None:
    """The whole data folder."""
    write_reason_seg(root, seed, {"train": train // 2, "val": val, "test": test})
    after = write_refer(
        root, seed, "refcoco", {"train": train, "val": val, "testA": test // 2, "testB": test // 2}, first_image=1
    )
    after = write_refer(root, seed, "fprefcoco", {"train": train, "val": val}, first_image=after)
    few = {"train": max(train // 20, 4), "val": max(val // 4, 1)}
    for family in (f for f in FAMILIES if f in SPLIT_BY and f not in ("refcoco", "fprefcoco")):
        after = write_refer(root, seed, family, few, first_image=after)
    write_vqa(root, seed, train // 6)
    write_sem_seg(root, seed, max(train // 20, 1))
    write_own(root, seed, {"train": 12, "val": 6})
