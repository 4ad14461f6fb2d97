"""The mini world: photographs of clothes, tinted, turned and laid over photographed ground, and what can be said of them.

    make_scene(rng, split)      -> Scene: picture and things with exact masks
    expressions(scene, rng)     -> phrases that fit exactly one thing
    reasoning(scene, rng)       -> questions that need a step
    false_premises(scene, rng)  -> phrases that fit nothing, with the nearest true one
    false_reasoning(scene, rng) -> questions that nothing answers
    caption(scene, rng)         -> all things, where they are
    small_talk(scene, rng)      -> questions that want words alone, with answers

Everything is a function of the generator handed in. Coordinates are (x, y), pixels of the picture. The photographs are
Fashion-MNIST's, the grounds scikit-image's (see assets/mini/README.md); `train` and `test` share neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import cv2
import numpy as np

from .phrases import (
    ABSENT_ANSWERS,
    ASKS,
    CAPTION_QUESTIONS,
    COLOURS,
    COUNT_WORDS,
    EXTREMES,
    HINTS,
    NAMES,
    SIDES,
    SINGULAR,
)

ASSETS = Path(__file__).resolve().parents[2] / "assets/mini"
SIZES_HW = ((224, 224), (224, 256), (256, 224), (208, 240))
EXTENT = {"small": (62, 74), "large": (98, 116)}
"""Longest side of a thing, pixels."""
VISIBLE = 0.7
"""Least share of a thing that nothing covers."""
CLEAR = 40
"""Least distance of centres, pixels, for one thing to be left of (above, …) another."""


@dataclass(frozen=True)
class Thing:
    """One photographed thing."""

    name: str
    colour: str
    size: str
    mask: np.ndarray
    """(H, W) bool, its visible pixels."""

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 of the visible pixels, inclusive."""
        ys, xs = np.nonzero(self.mask)
        return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())

    @cached_property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    things: list[Thing]


@dataclass(frozen=True)
class Expression:
    text: str
    target: int
    kind: str


@dataclass(frozen=True)
class Reasoning:
    text: str
    is_sentence: bool
    targets: list[int]
    answer_name: str


@dataclass(frozen=True)
class FalsePremise:
    text: str
    correction: str


# ------------------------------------------------------------------------------------------------ pictures


@lru_cache
def _photos() -> dict[str, np.ndarray]:
    return dict(np.load(ASSETS / "photos.npz"))


@lru_cache
def _textures() -> dict[str, np.ndarray]:
    return dict(np.load(ASSETS / "textures.npz"))


@lru_cache(maxsize=2048)
def _cutout(key: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(luminance, alpha) of one photograph at four times its size, float32 in [0, 1]."""
    photo = _photos()[key][index]
    solid = cv2.morphologyEx((photo > 20).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(solid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    alpha = cv2.drawContours(np.zeros_like(solid), contours, -1, 1, thickness=-1).astype(np.float32)
    light = photo.astype(np.float32) / 255
    light = np.where(alpha > 0, np.maximum(light, 0.25), light[alpha > 0].mean())
    light = light / max(float(np.percentile(light[alpha > 0], 95)), 0.3)
    big = {"dsize": (112, 112), "interpolation": cv2.INTER_CUBIC}
    return np.clip(cv2.resize(light.astype(np.float32), **big), 0, 1), np.clip(cv2.resize(alpha, **big), 0, 1)


def _ground(rng: np.random.Generator, split: str, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32 photographed ground, dim and slightly tinted, so that every colour stands out."""
    names = sorted(key for key in _textures() if key.startswith(f"{split}/"))
    texture = _textures()[names[rng.integers(len(names))]].astype(np.float32)
    scale = rng.uniform(1.35, 1.9)
    texture = cv2.resize(texture, None, fx=scale * 2, fy=scale, interpolation=cv2.INTER_LINEAR)
    top = rng.integers(texture.shape[0] - height + 1)
    left = rng.integers(texture.shape[1] - width + 1)
    crop = texture[top : top + height, left : left + width]
    crop = 92 + (crop - crop.mean()) * rng.uniform(0.35, 0.6) + rng.uniform(-18, 14)
    return crop[..., None] * rng.uniform(0.9, 1.1, 3).astype(np.float32)


def make_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """A picture with two to five things, each at least 70 % visible and inside what CLIP's centre crop sees."""
    height, width = SIZES_HW[rng.integers(len(SIZES_HW))]
    image = _ground(rng, split, height, width)
    owner = np.full((height, width), -1)
    full: list[int] = []
    looks: list[tuple[str, str, str]] = []
    wanted = rng.choice([2, 3, 4, 5], p=[0.15, 0.35, 0.35, 0.15])
    names = list(NAMES)
    for _ in range(wanted):
        if looks and rng.random() < 0.4:  # several of a kind make colour, size and place matter
            name = looks[rng.integers(len(looks))][0]
        else:
            name = names[rng.integers(len(names))]
        size = ("small", "large")[rng.integers(2)]
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        index = int(rng.integers(len(_photos()[f"{split}/{name}"])))
        light, alpha = _turn(*_cutout(f"{split}/{name}", index), rng, size)
        for _attempt in range(25):
            place = _place(rng, alpha.shape, height, width)
            window = owner[place]
            solid = alpha > 0.5
            covered = [int(((window == k) & solid).sum()) for k in range(len(full))]
            free = all((owner == k).sum() - c >= VISIBLE * full[k] for k, c in enumerate(covered))
            if free and sum(covered) <= 0.25 * solid.sum():
                break
        else:
            continue
        paint = np.array(COLOURS[colour], np.float32) * (0.3 + 0.7 * light[..., None])
        image[place] = image[place] * (1 - alpha[..., None]) + paint * alpha[..., None]
        window[solid] = len(full)
        full.append(int(solid.sum()))
        looks.append((name, colour, size))
    image = np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
    return Scene(image, [Thing(*look, mask=owner == k) for k, look in enumerate(looks)])


def _turn(
    light: np.ndarray, alpha: np.ndarray, rng: np.random.Generator, size: str
) -> tuple[np.ndarray, np.ndarray]:
    """Mirrored, turned by up to 20 degrees, scaled so that the silhouette's longest side has the size's extent, cropped."""
    if rng.random() < 0.5:
        light, alpha = light[:, ::-1], alpha[:, ::-1]
    ys, xs = np.nonzero(alpha > 0.5)
    scale = rng.uniform(*EXTENT[size]) / (max(np.ptp(xs), np.ptp(ys)) + 1)
    side = int(112 * scale * 1.35) + 2
    matrix = cv2.getRotationMatrix2D((56, 56), float(rng.uniform(-20, 20)), float(scale))
    matrix[:, 2] += side / 2 - 56
    light = cv2.warpAffine(np.ascontiguousarray(light), matrix, (side, side), borderMode=cv2.BORDER_REPLICATE)
    alpha = cv2.warpAffine(np.ascontiguousarray(alpha), matrix, (side, side))
    alpha = np.clip((cv2.GaussianBlur(alpha, (3, 3), 0) - 0.25) * 2, 0, 1)
    ys, xs = np.nonzero(alpha > 0.05)
    crop = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return light[crop], alpha[crop]


def _place(rng: np.random.Generator, shape: tuple[int, int], height: int, width: int) -> tuple[slice, slice]:
    """A window of that shape inside the picture whose centre lies well inside the central square."""
    side = min(height, width)
    spans = []
    for extent, length in ((shape[0], height), (shape[1], width)):
        low = max(0, (length - side) // 2 - extent // 8)
        high = min(length - extent, (length + side) // 2 - extent + extent // 8)
        start = int(rng.integers(low, max(high, low) + 1))
        spans.append(slice(start, start + extent))
    return spans[0], spans[1]


# ------------------------------------------------------------------------------------------------ language


def fits(thing: Thing, name: str | None = None, colour: str | None = None, size: str | None = None) -> bool:
    """The thing has every attribute that is given."""
    return (name in (None, thing.name)) and (colour in (None, thing.colour)) and (size in (None, thing.size))


def beside(a: Thing, b: Thing, side: str) -> bool:
    """`a` is clearly to that side of `b`: `CLEAR` pixels or more, and more along this axis than along the other."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    along, across = {"left": (-dx, dy), "right": (dx, dy), "top": (-dy, dx), "bottom": (dy, dx)}[side]
    return along >= CLEAR and along > abs(across)


def maybe_beside(a: Thing, b: Thing, side: str) -> bool:
    """Somebody might say that `a` is to that side of `b`."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    return {"left": -dx, "right": dx, "top": -dy, "bottom": dy}[side] > 8


def _say(rng: np.random.Generator, thing: Thing, parts: tuple[str, ...]) -> str:
    words = {"size": thing.size, "colour": thing.colour, "name": _name(rng, thing.name)}
    return " ".join(words[part] for part in ("size", "colour", "name") if part in parts)


def _name(rng: np.random.Generator, name: str) -> str:
    options = NAMES[name]
    return options[rng.integers(len(options))]


def _attributes(thing: Thing, parts: tuple[str, ...]) -> dict[str, str]:
    return {part: getattr(thing, part) for part in parts}


PARTS = (("name",), ("colour", "name"), ("size", "name"), ("size", "colour", "name"))


def expressions(scene: Scene, rng: np.random.Generator) -> list[Expression]:
    """Every way of naming one thing alone, in a random order: by attributes, as an extreme, by a relation."""
    found: list[Expression] = []
    for target, thing in enumerate(scene.things):
        for parts in PARTS:
            if _matching(scene, _attributes(thing, parts)) == [target]:
                found.append(Expression(_say(rng, thing, parts), target, "+".join(parts)))
        found += _extremes(scene, rng, target)
        found += _relations(scene, rng, target)
    order = rng.permutation(len(found))
    return [found[i] for i in order]


def _matching(scene: Scene, attributes: dict[str, str]) -> list[int]:
    return [i for i, thing in enumerate(scene.things) if fits(thing, **attributes)]


def _extremes(scene: Scene, rng: np.random.Generator, target: int) -> list[Expression]:
    thing = scene.things[target]
    rivals = [other for i, other in enumerate(scene.things) if i != target and other.name == thing.name]
    found = []
    for side, templates in EXTREMES.items():
        axis, sign = (0, 1) if side in ("left", "right") else (1, 1)
        sign = -1 if side in ("left", "top") else 1
        if rivals and all(sign * (thing.centre[axis] - r.centre[axis]) >= CLEAR for r in rivals):
            phrase = templates[rng.integers(len(templates))].format(_say(rng, thing, ("name",)))
            found.append(Expression(phrase, target, "extreme"))
    return found


def _relations(scene: Scene, rng: np.random.Generator, target: int) -> list[Expression]:
    thing = scene.things[target]
    found = []
    for anchor, other in enumerate(scene.things):
        parts = next((p for p in PARTS[:2] if _matching(scene, _attributes(other, p)) == [anchor]), None)
        if anchor == target or parts is None:
            continue
        for side, words in SIDES.items():
            if not beside(thing, other, side):
                continue
            own = PARTS[rng.integers(2)]
            rivals = [i for i in _matching(scene, _attributes(thing, own)) if i not in (target, anchor)]
            if not any(maybe_beside(scene.things[i], other, side) for i in rivals):
                text = f"{_say(rng, thing, own)} {words} the {_say(rng, other, parts)}"
                found.append(Expression(text, target, "relation"))
    return found


def reasoning(scene: Scene, rng: np.random.Generator) -> list[Reasoning]:
    """One question or hint a kind in the scene, answered by all things of that kind (and colour, if it names one)."""
    found = []
    for name in sorted({thing.name for thing in scene.things}):
        of_kind = [i for i, thing in enumerate(scene.things) if thing.name == name]
        colour = scene.things[of_kind[rng.integers(len(of_kind))]].colour if rng.random() < 0.4 else ""
        targets = [i for i in of_kind if colour in ("", scene.things[i].colour)]
        is_sentence = bool(rng.random() < 0.65)
        pool = (ASKS if is_sentence else HINTS)[name]
        text = pool[rng.integers(len(pool))].format(c=f"{colour} " if colour else "")
        found.append(Reasoning(text, is_sentence, targets, f"{colour} {name}".strip()))
    return found


def false_premises(scene: Scene, rng: np.random.Generator) -> list[FalsePremise]:
    """Phrases that fit nothing: another colour, an absent kind, the wrong side; each with the nearest phrase that fits."""
    found = []
    true = {e.target: e.text for e in expressions(scene, rng) if e.kind in ("name", "colour+name", "size+colour+name")}
    for target, text in true.items():
        thing = scene.things[target]
        colours = [c for c in COLOURS if not _matching(scene, {"name": thing.name, "colour": c})]
        wrong = colours[rng.integers(len(colours))]
        if _matching(scene, {"name": thing.name, "colour": thing.colour}) == [target]:
            text = _say(rng, thing, ("colour", "name"))
        found.append(FalsePremise(f"{wrong} {_name(rng, thing.name)}", text))
        for anchor, other in enumerate(scene.things):
            alone = _matching(scene, {"name": other.name}) == [anchor] and _matching(scene, {"name": thing.name}) == [target]
            for side, words in SIDES.items():
                opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[side]
                if alone and anchor != target and beside(thing, other, opposite):
                    a, b = _name(rng, thing.name), _name(rng, other.name)
                    found.append(FalsePremise(f"{a} {words} the {b}", f"{a} {SIDES[opposite]} the {b}"))
    absent = [name for name in NAMES if not _matching(scene, {"name": name})]
    if true:
        for name in rng.permutation(absent)[:2]:
            targets = list(true)
            target = targets[rng.integers(len(targets))]
            colour = f"{list(COLOURS)[rng.integers(len(COLOURS))]} " if rng.random() < 0.5 else ""
            found.append(FalsePremise(f"{colour}{_name(rng, str(name))}", true[target]))
    order = rng.permutation(len(found))
    return [found[i] for i in order]


def false_reasoning(scene: Scene, rng: np.random.Generator) -> list[tuple[str, bool, str]]:
    """(question, is_sentence, answer without [SEG]) about kinds that are not in the scene."""
    found = []
    absent = [name for name in NAMES if not _matching(scene, {"name": name})]
    for name in rng.permutation(absent)[:3]:
        is_sentence = bool(rng.random() < 0.65)
        pool = (ASKS if is_sentence else HINTS)[str(name)]
        answer = ABSENT_ANSWERS[rng.integers(len(ABSENT_ANSWERS))].format(name=SINGULAR.get(str(name), name))
        found.append((pool[rng.integers(len(pool))].format(c=""), is_sentence, answer))
    return found


def place(scene: Scene, thing: Thing) -> tuple[str, str]:
    """(row, column) of a thing's centre in words."""
    height, width = scene.image.shape[:2]
    x, y = thing.centre
    row = "top" if y < 0.36 * height else "bottom" if y > 0.64 * height else "middle"
    column = "left" if x < 0.36 * width else "right" if x > 0.64 * width else "middle"
    return row, column


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """All things with size, colour, kind and place, in a random order."""
    said = []
    for i in rng.permutation(len(scene.things)):
        thing = scene.things[i]
        words = " ".join(word for word in place(scene, thing) if word != "middle") or "middle"
        article = "" if thing.name in SINGULAR else "a "
        said.append(f"{article}{thing.size} {thing.colour} {_name(rng, thing.name)} at the {words}")
    return f"There is {', '.join(said[:-1])} and {said[-1]}." if len(said) > 1 else f"There is {said[0]}."


def small_talk(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions that want words and no mask, with their answers, in a random order."""
    talk = [(CAPTION_QUESTIONS[rng.integers(len(CAPTION_QUESTIONS))], caption(scene, rng))]
    count = len(scene.things)
    talk.append(("How many things are there?", f"There {'is' if count == 1 else 'are'} {COUNT_WORDS[count]}."))
    for i, thing in enumerate(scene.things):
        if thing.name not in SINGULAR and _matching(scene, {"name": thing.name}) == [i]:
            talk.append((f"Which colour has the {_name(rng, thing.name)}?", f"It is {thing.colour}."))
    return [talk[i] for i in rng.permutation(len(talk))]
