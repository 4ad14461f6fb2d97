#!/usr/bin/env bash
# Answer-forced evaluation, the protocol of the published ReasonSeg and RefCOCO numbers:
#
#   bash val_read.sh MODEL [flags of test_read.py]
#   bash val_read.sh runs/mini/merged --data "ReasonSeg|test" "refcoco|testA"
#
# The last --data counts. Writes results.json and predictions into --out, by default a folder for each model and settings.
set -euo pipefail
cd "$(dirname "$0")"

model=${1:?usage: bash val_read.sh MODEL [flags]}

exec python test_read.py --version "$model" --protocol forced --data "ReasonSeg|val" "refcoco|val" "${@:2}"
