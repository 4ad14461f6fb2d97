# make setup    a virtual environment in .venv (or in $VENV, if that is set) with everything from requirements.txt
# make demo     data, scores before, fine-tuning, merging, scores after, one picture answered: 8 minutes on two cores, no GPU
# make test     the tests
# make lint     the style
#
# Every target sets itself up first; the second time that takes no time.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# New requirements make a new stamp, and so a new installation.
STAMP := $(VENV)/.read-$(shell cksum < requirements.txt | cut -d' ' -f1)

# Seconds of fine-tuning in the demo, and where it leaves its results.
TRAIN_SECONDS ?= 180
DEMO ?= runs/demo
DATA ?= data/mini
BASE := assets/read-mini-base

export PATH := $(abspath $(BIN)):$(PATH)
ifeq ($(shell nvidia-smi -L 2>/dev/null | head -n 1),)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: setup demo test lint clean

setup: $(STAMP)

# --no-compile saves half a minute: Python compiles what is imported when it is imported.
$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -r requirements.txt
	rm -f $(VENV)/.read-*
	touch $@
	@echo "installed into $(VENV); to run the scripts by hand: source $(BIN)/activate"

test: setup
	OMP_NUM_THREADS=1 python -m pytest -q

lint: setup
	ruff check .

demo: setup
	@printf '\n== 1/7 data in the formats of ReasonSeg, RefCOCO and FP-RefCOCO: $(DATA)\n'
	python -m dataset.mini --out $(DATA)
	@printf '\n== 2/7 before: the base $(BASE) on ReasonSeg and RefCOCO val, answers forced\n'
	bash val_read.sh $(BASE) --dataset_dir $(DATA) --out $(DEMO)/before
	@printf '\n== 3/7 fine-tuning with DeepSpeed and LoRA for at most $(TRAIN_SECONDS) s: $(DEMO)/train\n'
	bash train_read.sh mini --log_base_dir $(DEMO) --exp_name train --dataset_dir $(DATA) --no_eval --overwrite \
	  --time_limit_s $(TRAIN_SECONDS)
	@printf '\n== 4/7 merging LoRA: $(DEMO)/merged\n'
	bash merge_lora_weight.sh $(DEMO)/train $(DEMO)/merged --overwrite
	@printf '\n== 5/7 after: the same as 2\n'
	bash val_read.sh $(DEMO)/merged --dataset_dir $(DATA) --out $(DEMO)/after
	@printf '\n== 6/7 FP-RefCOCO, answers generated\n'
	bash test_read.sh $(DEMO)/merged --dataset_dir $(DATA) --out $(DEMO)/test
	@printf '\n== 7/7 one picture, one question\n'
	python demo.py --version $(DEMO)/merged --image $(DATA)/reason_seg/ReasonSeg/val/0.jpg --prompt "Which of these carries your books?" --vis_save_path $(DEMO)/answers

clean:
	rm -rf runs/demo data/mini .pytest_cache .ruff_cache
