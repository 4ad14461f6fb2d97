"""Cuts the photographs of the mini world out of Fashion-MNIST and scikit-image's textures.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb debian
    pip download --no-deps scikit-image && unzip scikit_image-*.whl 'skimage/data/*' -d wheel
    python scripts/cut_fashion_mnist.py debian/usr/share/datasets/fashion-mnist wheel/skimage/data

writes assets/mini/photos.npz and assets/mini/textures.npz, the same bytes each time. Only photographs whose silhouette is one
solid piece are taken, so that every mask in the mini world is clean. Coats and shirts are left out: at 28 pixels nobody tells
them from pullovers and t-shirts.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import plain_errors  # noqa: E402
from utils.files import read_bytes  # noqa: E402

CLASSES = {0: "t-shirt", 1: "trousers", 2: "pullover", 3: "dress", 5: "sandal", 7: "sneaker", 8: "bag", 9: "boot"}
COUNTS = {"train": 700, "test": 80}
FILES = {"train": "train", "test": "t10k"}
TEXTURES = ("brick", "grass", "gravel")


def silhouette(photo: np.ndarray) -> np.ndarray:
    """(28, 28) uint8 photograph on black -> bool mask of the thing, holes filled."""
    solid = cv2.morphologyEx((photo > 20).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(solid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(solid), contours, -1, 1, thickness=-1).astype(bool)


def is_clean(photo: np.ndarray) -> bool:
    """One piece, neither tiny nor the whole frame, and bright enough to be tinted."""
    mask = silhouette(photo)
    pieces, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return pieces == 2 and 130 < stats[1, cv2.CC_STAT_AREA] < 640 and photo[mask].mean() > 80


def read_idx(file: Path, header: int, size: int) -> np.ndarray:
    """The uint8 values of a compressed IDX file behind its header, a multiple of `size`.

    Raises:
        FileNotFoundError, ValueError: with the file's name.
    """
    data = read_bytes(file)
    try:
        values = np.frombuffer(gzip.decompress(data)[header:], np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged or no gzip file: {error}") from error
    if not len(values) or len(values) % size:
        raise ValueError(f"{file} holds {len(values)} values, which is no multiple of {size}: download it again")
    return values


@plain_errors("cut_fashion_mnist.py")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fashion", type=Path)
    parser.add_argument("skimage", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "assets/mini")
    args = parser.parse_args(argv)
    photos = {}
    for split, stem in FILES.items():
        images = read_idx(args.fashion / f"{stem}-images-idx3-ubyte.gz", 16, 28 * 28).reshape(-1, 28, 28)
        labels = read_idx(args.fashion / f"{stem}-labels-idx1-ubyte.gz", 8, 1)
        for label, name in CLASSES.items():
            clean = [photo for photo in images[labels == label][: 8 * COUNTS[split]] if is_clean(photo)]
            photos[f"{split}/{name}"] = np.stack(clean[: COUNTS[split]])
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out / "photos.npz", **photos)
    textures = {}
    for name in TEXTURES:  # the left half is for training, the right half for val and test
        whole = cv2.imdecode(np.frombuffer(read_bytes(args.skimage / f"{name}.png"), np.uint8), cv2.IMREAD_GRAYSCALE)
        if whole is None:
            raise ValueError(f"{args.skimage / name}.png cannot be read as an image")
        grey = cv2.resize(whole, (384, 384), interpolation=cv2.INTER_AREA)
        textures[f"train/{name}"], textures[f"test/{name}"] = grey[:, :192], grey[:, 192:]
    np.savez_compressed(args.out / "textures.npz", **textures)
    for file in ("photos.npz", "textures.npz"):
        print(f"{file}: {(args.out / file).stat().st_size / 1e6:.2f} MB")
    print({name: len(stack) for name, stack in photos.items()})


if __name__ == "__main__":
    main()
