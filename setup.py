"""Packaging. Version ranges are here, exact pins in constraints.txt, so that an install inside NVIDIA's
container replaces neither torch nor TransformerEngine.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "megatron_ultralong" / "__init__.py").read_text())[1]

gguf = ["gguf", "accelerate"]
docs = ["mkdocs-material>=9.6,<10", "mkdocstrings-python>=2"]  # the site; its Python API from docstrings
lm_eval = ["lm-eval>=0.4.13,<0.5"]  # its tasks are read by their files, its models' interface is implemented

setup(
    name="megatron_ultralong",
    version=version,
    description="Extends Llama models to 1M, 2M and 4M tokens of context with Megatron-Core.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={"Paper of the recipe": "https://arxiv.org/abs/2504.06214"},
    packages=find_packages(include=["megatron_ultralong", "megatron_ultralong.*"]),
    package_data={"megatron_ultralong": ["py.typed"]},
    entry_points={"console_scripts": ["ultralong = megatron_ultralong.commands.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # What CI runs the tests on. On 3.13.0 they were run once: one failed, on the size of example data made of
    # Python's own text.
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.6",  # tensors, torch.distributed, the attention kernels
        # Parallel layers, pipeline schedules, distributed optimizer, checkpoints; 0.17+ needs Python 3.12.
        "megatron-core>=0.16.1,<0.20",
        "numpy",  # packed data files
        "einops",  # used by Megatron-Core's attention, which does not require it itself
        "psutil",  # used by Megatron-Core's checkpoint writers, which do not require it themselves
        "transformers>=4.56",  # tokenizers, and models to evaluate
        "tokenizers",  # fast tokenizers
        "sentencepiece",  # tokenizers of older Llama models
        "jinja2>=3.1",  # chat templates, in transformers
        "safetensors>=0.4.3",  # Hugging Face weights, read and written slice by slice
        "pyarrow",  # raw documents in parquet
        "zstandard",  # raw documents in .jsonl.zst
        "openai>=1.40",  # client of OpenAI-compatible endpoints, which refine answers and are evaluated
        "tenacity>=8.3",  # waits and tries again where such an endpoint is busy
        "pyyaml",  # files of sources; custom prompts
        "regex",  # Unicode scripts and marks, for the words that decontamination compares
        "huggingface_hub>=0.34",  # benchmarks' files from the hub
        "jieba>=0.42.1",  # Chinese words, as in LV-Eval's scorer
        "rouge>=1.0.1,<2",  # ROUGE-L, as in LV-Eval's scorer
        "rouge_score>=0.1.2",  # ROUGE-Lsum, as in InfiniteBench's scorer
        "matplotlib",  # heat maps
        "tensorboard",  # training curves
        "tqdm",  # progress bars
        "shtab>=1.13",  # completion of the command in a shell
    ],
    extras_require={
        # TransformerEngine's linears and norms; NVIDIA's container has it already.
        "gpu": ["transformer-engine[pytorch]>=2.0"],
        # MMLU, MMLU-Pro, MATH, GSM8K and HumanEval.
        "eval": lm_eval,
        # Reads GGUF files: tools/inspect_rope.py, and the model of examples/smollm2.sh.
        "gguf": gguf,
        # Weights & Biases beside TensorBoard (runtime.wandb).
        "wandb": ["wandb"],
        # make docs
        "docs": docs,
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.7",
            "ruff",
            "mypy",
            "peft>=0.15",  # the reference of adapters (LoRA), and the reader of their exports
            *gguf,
            *lm_eval,
            *docs,
        ],  # tests/parity/test_smollm2.py reads that GGUF file too
    },
)
