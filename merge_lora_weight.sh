#!/usr/bin/env bash
# Merges a training run into a model folder:  bash merge_lora_weight.sh RUN OUT [flags of utils/merge_lora.py]
#
#   bash merge_lora_weight.sh runs/mini runs/mini/merged
#   bash merge_lora_weight.sh runs/mini runs/mini/last --tag last
#
# ZeRO shards -> float32 -> LoRA folded in -> weights, config, tokenizer and processor in OUT. The shards are kept.
set -euo pipefail
cd "$(dirname "$0")"

exec python -m utils.merge_lora "${1:?usage: bash merge_lora_weight.sh RUN OUT [flags]}" "${2:?OUT is missing}" "${@:3}"
