"""Package metadata and dependencies. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megaboat",
    version="0.1.0",
    description="Distributed training of SeqBoat language models: sparse modular activation at scale",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["megaboat", "megaboat.*"]),
    package_data={"megaboat.tools": ["*.html"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "numpy>=1.26,<3",
        "pydantic>=2.7,<3",
        "pyyaml>=6,<7",
        "sentencepiece>=0.2.1,<0.3",
        "zstandard>=0.22,<1",
        "webdataset>=1.0.2,<2",
        "safetensors>=0.5,<1",
        "transformers>=5,<6",
        "tensorboard>=2.18,<3",
        "matplotlib>=3.8,<4",
        "submitit>=1.5,<2",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "flash": ["flash-attn-4"],
        "parquet": ["pyarrow>=17"],
        "hf": [
            "accelerate>=1",
            "peft>=0.17",
            "lm_eval>=0.4.9",
        ],  # the clients that tests run exports with; else skipped
        "test": [
            "pytest>=8,<10",
            "hypothesis>=6,<7",
            "pytest-xdist>=3,<4",
            "pyarrow>=17",
            "triton>=3.7; platform_machine == 'x86_64'",
        ],
        "dev": ["ruff==0.17.*", "mypy>=1.15", "pre-commit>=4", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["megaboat=megaboat.cli:main"]},
)
