"""What entry scripts, `model` and `dataset` share. Nothing but the script merge_lora imports either of the two."""
