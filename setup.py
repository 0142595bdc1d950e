"""Where the packages lie. The device code is a folder of its own in the house, and a part of fused_gp when installed:
a top-level package named `kernels` belongs to another project on PyPI.
"""

from setuptools import setup

setup(
    packages=["fused_gp", "fused_gp.kernels"],
    package_dir={"fused_gp": "fused_gp", "fused_gp.kernels": "kernels"},
)
