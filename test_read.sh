#!/usr/bin/env bash
# Generative evaluation, the protocol of the published FP-RefCOCO numbers:
#
#   bash test_read.sh MODEL [flags of test_read.py]
#   bash test_read.sh rui-qian/READ-LLaVA-v1.5-7B-for-fprefcoco --dataset_dir ./data --preset read-7b-fprefcoco --compat released
#
# The last --data counts. Writes results.json and predictions into --out, by default a folder for each model and settings.
set -euo pipefail
cd "$(dirname "$0")"

model=${1:?usage: bash test_read.sh MODEL [flags]}

exec python test_read.py --version "$model" --protocol generate --data "fprefcoco|val" "${@:2}"
