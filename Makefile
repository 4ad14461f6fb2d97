# make setup    a virtual environment in .venv (or in $VENV, if that is set) with everything from requirements.txt
# make demo     data, scores before, fine-tuning, merging, scores after, one picture answered: 4 to 6 minutes on two cores, no GPU
# make app      the page: pictures and questions in a browser, at http://localhost:7860; ARGS="--version MODEL --port 8000" and so on
# make test     the tests
# make lint     the style
#
# Every target sets itself up first; the second time that takes no time.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# New requirements make a new stamp, and so a new installation.
STAMP := $(VENV)/.read-$(shell cksum < requirements.txt | cut -d' ' -f1)
APP_STAMP := $(VENV)/.read-app-$(shell cat requirements.txt requirements-app.txt | cksum | cut -d' ' -f1)

# The demo: seconds of fine-tuning, pictures of each data set that are measured, places, and what is asked at the end.
TRAIN_SECONDS ?= 120
LIMIT ?= 40
DEMO ?= runs/demo
DATA ?= data/mini
BASE := assets/read-mini-base
PICTURE ?= $(DATA)/reason_seg/ReasonSeg/val/mini_val_0012.jpg
QUESTION ?= Which white footwear belongs on a tennis court?

# Processes that run tests, a file each at a time.
JOBS ?= 2

export PATH := $(abspath $(BIN)):$(PATH)
ifeq ($(shell nvidia-smi -L 2>/dev/null | head -n 1),)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: setup setup-app demo app test lint clean

setup: $(STAMP)

# --no-compile saves half a minute: Python compiles what is imported when it is imported.
$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -r requirements.txt
	rm -f $(VENV)/.read-*
	touch $@
	@echo "installed into $(VENV); to run the scripts by hand: source $(BIN)/activate"

# The page's own packages, in the same environment; the tests open the page.
setup-app: $(APP_STAMP)

$(APP_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-compile -r requirements-app.txt
	rm -f $(VENV)/.read-app-*
	touch $@

app: setup-app
	python app.py $(ARGS)

test: setup-app
	OMP_NUM_THREADS=1 python -m pytest -q -n $(JOBS) --dist loadfile

lint: setup
	ruff check .

demo: setup
	@printf '\n== 1/7 data in the formats of ReasonSeg, RefCOCO and FP-RefCOCO: $(DATA)\n'
	python -m dataset.mini --out $(DATA)
	@printf '\n== 2/7 before: the base on ReasonSeg and RefCOCO val, answers forced\n'
	bash val_read.sh $(BASE) --dataset_dir $(DATA) --limit $(LIMIT) --out $(DEMO)/before --overwrite
	@printf '\n== 3/7 fine-tuning with DeepSpeed and LoRA for $(TRAIN_SECONDS) s\n'
	bash train_read.sh mini --version $(BASE) --dataset_dir $(DATA) --log_base_dir $(DEMO) --exp_name train --overwrite --no_eval \
	  --time_limit_s $(TRAIN_SECONDS)
	@printf '\n== 4/7 merging LoRA into the base\n'
	bash merge_lora_weight.sh $(DEMO)/train $(DEMO)/merged --overwrite
	@printf '\n== 5/7 after: as in 2\n'
	bash val_read.sh $(DEMO)/merged --dataset_dir $(DATA) --limit $(LIMIT) --out $(DEMO)/after --overwrite
	python -m utils.compare $(DEMO)/before $(DEMO)/after --html $(DEMO)/compare.html
	@printf '\n== 6/7 FP-RefCOCO val, answers generated\n'
	bash test_read.sh $(DEMO)/merged --dataset_dir $(DATA) --limit $(LIMIT) --out $(DEMO)/test --overwrite
	@printf '\n== 7/7 one picture, one question: $(DEMO)/answers\n'
	python demo.py --version $(DEMO)/merged --image $(PICTURE) --prompt "$(QUESTION)" --vis_save_path $(DEMO)/answers

clean:
	rm -rf runs/demo data/mini .pytest_cache .ruff_cache
