"""Build of npu-rec; the metadata stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["npu_rec", "npu_rec.*"]),
    # npu_rec/configs is a link to configs/ at the top, so that the YAML files travel with the package
    package_data={"npu_rec": ["configs/*.yaml", "configs/*/*.yaml"]},
)
