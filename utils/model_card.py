"""The card of a model folder, filled from the run that made it: `python -m utils.model_card MODEL [--results EVAL ...]`.

`merge_lora_weight.sh` writes one into every model that it makes; with --results it is written again, with the scores that
test_read.py measured. The front matter is the hub's (tags, base, scores), so the folder can be uploaded as it is:
`hf upload USER/NAME MODEL`. The text is the template beside this file, `model_card.md`.

This is an entry script: it may know the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from utils.args import CONFIG_NAME, LOSS_FLAGS, TrainArgs
from utils.cli import plain_errors
from utils.files import as_object, read_object, whole_number, write_text
from utils.metrics import summarize
from utils.outputs import check_file
from utils.prediction_log import read_finished
from utils.predictions import expressions, predictions_name
from utils.scores import read_results

if TYPE_CHECKING:
    from model import READConfig

CARD, MERGED_FROM = "README.md", "merged_from.json"
MARK = "<!-- Written by python -m utils.model_card, which replaces this file if it is asked to (--overwrite). -->"
"""In each card, so that it is known as ours when it is to be replaced."""
TEMPLATE = Path(__file__).with_suffix(".md")
WITH_POINTS = (
    "SasP turns the\nsimilarity between that token and the image tokens into points, and SAM, prompted with the projected token "
    "and\nthose points,"
)
METRICS = {"giou": "gIoU", "ciou": "cIoU", "see": "See"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.model_card", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder, as merge_lora_weight.sh writes it")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="EVAL", help="folders of test_read.py with scores of this model"
    )
    parser.add_argument("--name", help="what the model is called, e.g. its id on the hub (default: the folder)")
    parser.add_argument(
        "--overwrite", action=argparse.BooleanOptionalAction, default=False,
        help="replace the card that this program wrote there",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Writes MODEL/README.md."""
    options = build_parser().parse_args(argv)
    with plain_errors("model_card"):
        file = options.model / CARD
        check_file(file, "MODEL", MARK)
        if file.exists() and not options.overwrite:
            raise FileExistsError(f"{file} is there already: keep it, or replace it with --overwrite")
        write_text(file, model_card(options.model, options.name, [measured(folder) for folder in options.results]))
        print(file)


def measured(folder: Path) -> dict[str, Any]:
    """The results.json of an evaluation, if the predictions beside it are whole and give its scores.

    Raises:
        FileNotFoundError: the folder has none. ValueError: it, or a predictions file, is damaged or of another evaluation.
    """
    record = read_results(folder)
    for name in ("version", "checkpoint", "protocol", "compat", "templates", "conv_type", "command"):
        if not isinstance(record.get(name), str):
            raise ValueError(f"{folder / 'results.json'} lacks {name}, which test_read.py writes: measure the model again")
    for row in record["results"]:
        file = folder / predictions_name(row["dataset"], row["split"])
        if not file.exists():
            continue
        records, about = read_finished(file)
        settings = about["settings"] if about else {}
        found = summarize(expressions(records), generated=record["protocol"] == "generate", resamples=0)
        same = all(math.isclose(_score(row, name), _score(found, name), abs_tol=1e-6) for name in ("giou", "ciou"))
        if not same or settings.get("dataset", row["dataset"]) != row["dataset"]:
            raise ValueError(f"{file} does not give the scores of {row['dataset']}|{row['split']} in results.json: measure again")
    return record


def _score(scores: dict[str, Any], name: str) -> float:
    """A score; 0 where there is none, so that two of these agree."""
    value = scores.get(name)
    return 0.0 if value is None or math.isnan(value) else value


def model_card(
    model: Path,
    name: str | None = None,
    evaluations: Sequence[dict[str, Any]] = (),
) -> str:
    """The text of a card.

    Args:
        model: the folder; its config.json says what the model is, its merged_from.json where it comes from.
        name: what it is called.
        evaluations: contents of results.json files.

    Raises:
        ValueError: the folder is no model in our own layout, or an evaluation is of other weights.
    """
    from model import READConfig
    from model.checkpoint import fingerprint

    name = name or model.resolve().name
    file = model / "config.json"
    fields = read_object(file) if file.is_file() else {}
    if fields.get("model_type") != READConfig.model_type:
        raise ValueError(f"{model} is no model in READ's own layout, which merge_lora_weight.sh writes: {file} does not say so")
    config = READConfig.from_dict(fields)
    weights = fingerprint(str(model)) if evaluations else None
    for found in evaluations:
        if found.get("checkpoint") != weights:
            raise ValueError(f"the scores of {found['version']} are those of other weights than {model}: measure this model")
    record = read_merged_from(model)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        mark=MARK,
        front=front_matter(name, config, evaluations, record),
        name=name,
        path=WITH_POINTS if config.sasp.enabled else "and SAM, prompted with the projected token (SasP is off),",
        sizes=table({"part": "size"} | sizes(config)),
        training=training(record),
        scores=scores(config, evaluations, record),
    )


def read_merged_from(model: Path) -> dict[str, Any] | None:
    """What merging wrote about where a model is from; None if there is nothing.

    Raises:
        ValueError: it is damaged.
    """
    file = model / MERGED_FROM
    if not file.exists():
        return None
    record = read_object(file)
    for name in ("run", "checkpoint", "base", "preset"):
        if not isinstance(record.get(name), str) and not (name == "preset" and record.get(name) is None):
            raise ValueError(f"{file}, {name}: must be text, found {record.get(name)!r}: take the file away, or merge again")
    return record


def front_matter(
    name: str, config: READConfig, evaluations: Sequence[dict[str, Any]], record: dict[str, Any] | None
) -> str:
    """The YAML that the hub reads. A base is named if it is a repository there, not a folder here."""
    from huggingface_hub import EvalResult, ModelCardData

    base = record["base"] if record else None
    on_hub = base is not None and base.count("/") == 1 and base[0] not in "./~" and not Path(base).exists()
    results = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=result["dataset"],
            dataset_name=f"{result['dataset']} {result['split']}",
            dataset_config=protocol(found, config),
            dataset_split=result["split"],
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=round(100 * result[metric], 2),
        )
        for found in evaluations
        for result in found["results"]
        for metric in METRICS
        if result.get(metric) is not None
    ]
    data = ModelCardData(
        language="en",
        pipeline_tag="image-segmentation",
        tags=["read", "reasoning-segmentation", "referring-expression-segmentation", "llava", "segment-anything"],
        base_model=base if on_hub else None,
        model_name=name.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def sizes(config: READConfig) -> dict[str, str]:
    """What the model is made of."""
    text, clip, sam, sasp = config.llava.text_config, config.llava.vision_config, config.sam, config.sasp
    points = f"{sasp.num_points} points, t_pos {sasp.t_pos}, t_neg {sasp.t_neg}, down-sampling {sasp.down_sample}"
    return {
        "language model": f"LLaMA, {text.num_hidden_layers} layers, {text.hidden_size} wide, {text.vocab_size} tokens",
        "CLIP tower": f"{clip.image_size} pixels, patches of {clip.patch_size}: {config.num_patches} image tokens",
        "SAM": f"{sam.depth} layers, {sam.embed_dim} wide, {sam.image_size} pixels",
        "SasP": f"{points}, geometry {sasp.geometry}" if sasp.enabled else "off",
    }


def training(record: dict[str, Any] | None) -> str:
    """How the weights came about, from the settings that their run kept."""
    if record is None:
        return "Not recorded with this folder."
    run = Path(record["run"])
    rows = {"base": f"`{record['base']}`", "preset": record["preset"] or "none", "checkpoint": Path(record["checkpoint"]).name}
    if (run / CONFIG_NAME).is_file():
        train = TrainArgs.load(run)
        kept = read_object(run / CONFIG_NAME)
        per_step = train.batch_size * train.grad_accumulation_steps * whole_number(
            kept.get("world_size"), f"{run / CONFIG_NAME}, world_size"
        )
        lora = f"LoRA of rank {train.lora_r}, alpha {train.lora_alpha} on {train.lora_target_modules}"
        rows |= {
            "data, by rate": ", ".join(f"{name} {rate:g}" for name, rate in train.mixture()),
            "language model": lora if train.lora_r else "in full",
            "steps": f"at most {train.epochs} x {train.steps_per_epoch}, {per_step} pictures each",
            "learning rate": f"{train.lr:g}, {train.warmup_steps} steps of warm-up",
            "loss": ", ".join(f"{name} {getattr(train, f'{name}_loss_weight'):g}" for name in LOSS_FLAGS),
            "precision": train.precision,
            "packages": ", ".join(f"{name} {version}" for name, version in as_object(kept.get("versions"), "versions").items()),
        }
    return table({"setting": "value"} | rows)


def scores(config: READConfig, evaluations: Sequence[dict[str, Any]], record: dict[str, Any] | None) -> str:
    """Measured scores with their protocol; what the run itself validated with where there are none."""
    lines = []
    for found in evaluations:
        for result in found["results"]:
            values = [f"{100 * result[metric]:.1f}" if result.get(metric) is not None else "" for metric in METRICS]
            failed = result.get("failed")
            lost = f", {len(failed)} images failed and left out" if failed else ""
            data = f"{result['dataset']} {result['split']}{lost}"
            lines.append(" | ".join(["", data, protocol(found, config), *values, ""]).strip())
    if lines:
        told = [row.get("command", found["command"]) for found in evaluations for row in found["results"]]
        commands = "".join(f"\n    {command}" for command in dict.fromkeys(told))
        title = " | ".join(["", "data", "protocol", *METRICS.values(), ""]).strip()
        return "\n".join([title, "|---|---|" + "---|" * len(METRICS), *lines, "", "Percent, measured by", commands])
    best = Path(record["run"]) / "best.json" if record else None
    if best is not None and best.is_file():
        found = read_object(best)
        known = all(type(found.get(name)) in (int, float) for name in ("giou", "ciou")) and "val_dataset" in found
        if known and found.get("tag") == Path(record["checkpoint"]).name:
            return (
                f"While it was trained, before merging, on {found['val_dataset']} with the answers forced: gIoU "
                f"{100 * found['giou']:.1f}, cIoU {100 * found['ciou']:.1f}; the checkpoint was chosen by them."
            )
    return "Not measured yet."


def protocol(found: dict[str, Any], config: READConfig) -> str:
    """How an evaluation asked, in words, and in what it departs from the model as it comes; never to be mixed."""
    words = ["answers forced" if found["protocol"] == "forced" else "answers generated"]
    if found["compat"] == "released":
        words.append("padding as released")
    if found["templates"] != "fixed":
        words.append(f"{found['templates']} templates")
    if found["conv_type"] != config.conv_type:
        words.append(f"prompt {found['conv_type']}")
    own, asked = dataclasses.asdict(config.sasp), found.get("sasp") or {}
    if asked.get("enabled") != own["enabled"]:
        words.append("SasP on" if asked.get("enabled") else "SasP off")
    elif asked["enabled"]:
        words += [f"{name} {value}" for name, value in asked.items() if value != own.get(name)]
    if found.get("bits") is not None:
        words.append(f"blocks in {found['bits']} bits")
    if found.get("limit") is not None:
        words.append(f"first {found['limit']} pictures")
    return ", ".join(words)


def table(rows: dict[str, str]) -> str:
    """Two columns of Markdown; the first row is the heading."""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
