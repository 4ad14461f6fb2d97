"""`python -m dataset.mini --out data/mini` writes READ-mini's data sets."""

import argparse
from pathlib import Path

from .write import write_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dataset.mini", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/mini"), help="data folder, as --dataset_dir takes it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=600, help="training pictures a referring set; others have a share of it")
    parser.add_argument("--val", type=int, default=80, help="pictures of val")
    parser.add_argument("--test", type=int, default=60, help="pictures of test (testA and testB: half each)")
    args = parser.parse_args()
    write_all(args.out, args.seed, args.train, args.val, args.test)
    pictures = len(list(args.out.rglob("*.jpg")))
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file()) / 1e6
    print(
        f"wrote {args.out}: {pictures} pictures, {size:.0f} MB "
        "(ReasonSeg, RefCOCO, FP-RefCOCO, LLaVA-Instruct, semantic sets, own data)"
    )


if __name__ == "__main__":
    main()
