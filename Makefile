# make test: everything a change must pass, from a fresh clone on. make lint: the quick part of it. make test-all: also
# what takes long, such as killing runs a hundred times.
PYTHON ?= python3
VENV = .venv/bin

.PHONY: demo demo-fast train-demo test test-all test-export lint unit

# From nothing to a model that answers, in out/demo: 14 to 18 minutes on 2 cores with bfloat16. Stopped, it goes on.
demo: train-demo
	@echo "Weights, curves and answers are in $(DEMO). Next: train on your own data, see README.md."
	@if [ -t 0 ]; then $(VENV)/python 2-eval.py --checkpoint $(DEMO)/dpo_256.pth --temperature 0; fi

# The same with fewer facts, in less than half the time; fails if fewer than half of the answers are right.
demo-fast: DEMO = out/demo-fast
demo-fast: SAMPLE = --share 0.1 --read 1 --asked 5 --asked_otherwise 4 --follow_ups 3 --unknown 12 --pairs 80 --tested 3
demo-fast: FLOOR = --floor 0.5
demo-fast: train-demo

DEMO = out/demo
SAMPLE = --share 0.5
ANSWER = --temperature 0 --repetition_penalty 1 --max_new_tokens 48 --test $(DEMO)/sample/test.json
train-demo: .venv/installed
	$(VENV)/python dataset/make_sample.py --out_dir $(DEMO)/sample $(SAMPLE)
	$(VENV)/python data_process.py --data_path $(DEMO)/sample/pretrain.jsonl $(DEMO)/sample/sft.jsonl $(DEMO)/sample/dpo.jsonl --out_dir $(DEMO)/data
	$(VENV)/python 1-pretrain.py --model tiny --n_layers 4 --max_seq_len 256 --data_path $(DEMO)/data/pretrain_data.bin --out_dir $(DEMO)
	$(VENV)/python 3-full_sft.py --max_seq_len 256 --learning_rate 3e-3 --epochs 1 --data_path $(DEMO)/data/sft_data_single.csv --out_dir $(DEMO)
	$(VENV)/python 3-full_sft.py --max_seq_len 256 --learning_rate 3e-3 --epochs 1 --data_path $(DEMO)/data/sft_data.csv --out_dir $(DEMO)
	$(VENV)/python 2-eval.py --checkpoint $(DEMO)/multi_chat/full_sft_256.pth $(ANSWER) --output $(DEMO)/before_dpo.json
	$(VENV)/python 5-dpo_train.py --max_seq_len 256 --batch_size 16 --init_from $(DEMO)/multi_chat/full_sft_256.pth --data_path $(DEMO)/data/dpo/train_data.json --out_dir $(DEMO)
	$(VENV)/python 2-eval.py --checkpoint $(DEMO)/dpo_256.pth $(ANSWER) --compare $(DEMO)/before_dpo.json --output $(DEMO)/answers.json $(FLOOR)

test: lint unit demo-fast

# Installed anew whenever the requirements change.
.venv/installed: requirements.txt requirements-dev.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(VENV)/pip install -q -r requirements-dev.txt
	touch $@

lint: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

unit: .venv/installed
	$(VENV)/python -m pytest -n 2 --dist worksteal --timeout 180

test-all: lint
	$(VENV)/python -m pytest -n 2 --dist worksteal --timeout 900 -m "slow or not slow"

# Exports against llama.cpp, which is built from source (some 12 minutes on 2 cores).
test-export: .venv/installed
	$(VENV)/pip install -q -r requirements-export.txt
	$(VENV)/python tests/bench/llama_cpp_check.py
