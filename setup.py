"""Packages of the wheel: emu_jax, and the top-level configs/ as emu_jax.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["emu_jax*"]), "emu_jax.configs"],
    package_dir={"emu_jax.configs": "configs"},
    package_data={"emu_jax": ["py.typed"]},
)
