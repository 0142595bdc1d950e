"""The packages and their folders. The device code is a folder of its own here, and a part of fused_gp when installed:
the top-level name `kernels` belongs to another project on PyPI.
"""

from setuptools import setup

setup(
    packages=["fused_gp", *[f"fused_gp.{name}" for name in ("methods", "critics", "derivatives", "ops", "kernels")]],
    package_dir={"fused_gp": "fused_gp", "fused_gp.kernels": "kernels"},
)
