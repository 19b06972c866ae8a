"""Builds the package: metadata is in pyproject.toml, what to compile in build_config.py."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))  # a build front-end leaves it out

import build_config

setup(**build_config.setup_arguments())
