# make demo: an Emu learns drawings on this machine, and a page shows it.   make demo-chat: it learns to answer questions.   make test: every test.
PYTHON ?= python3
python = .venv/bin/python

demo: .venv/ready
	$(python) -m emu_jax.data build --kind=openmoji --to=data/demo
	$(python) -m emu_jax.train --config=configs/demo.py:warmup
	$(python) -m emu_jax.train --config=configs/demo.py
	$(python) -m emu_jax.evaluate --task=demo --checkpoint=runs/demo/emu

demo-chat: .venv/ready
	test -d runs/demo/emu/checkpoints || $(MAKE) demo
	$(python) -m emu_jax.data build --kind=openmoji --to=data/demo
	$(python) -m emu_jax.train --config=configs/demo.py:instruct
	$(python) -m emu_jax.evaluate --task=demo-chat --checkpoint=runs/demo/instruct

test: .venv/ready
	$(python) -m pytest -n 2

test-long: .venv/ready
	$(python) -m pytest -m long

lint: .venv/ready
	$(python) -m pip install -q "ruff>=0.15,<0.18" && .venv/bin/ruff check .

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is too old: Python 3.11 or newer is needed; make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(python) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: demo demo-chat test test-long lint
