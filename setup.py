"""Build of npu-rec; the metadata stands in pyproject.toml.

The C++ kernels need torch at build time (`pip install --no-build-isolation`, as `make` does) and a compiler.
Without either the package installs all the same and runs its plain PyTorch backends; `npu-rec doctor` says so.
"""

import os
import shutil
import sys
from glob import glob

from setuptools import find_packages, setup

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
extensions, commands = [], {}
try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    print("npu-rec: no torch in the build environment, the C++ kernels are left out", file=sys.stderr)
else:
    if shutil.which(os.environ.get("CXX", "c++")):
        extensions = [
            CppExtension(
                "npu_rec._C",
                sorted(glob("kernels/cpu/*.cpp")),
                include_dirs=["kernels/cpu"],
                depends=sorted(glob("kernels/cpu/*.h") + glob("kernels/cpu/*.inc")),
                # -fopenmp without linking an OpenMP library: at::parallel_for then runs on torch's own threads
                extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-g0"],
                optional=True,  # a compiler that fails costs the kernels, not the installation
            )
        ]
        commands = {"build_ext": BuildExtension.with_options(use_ninja=False)}
    else:
        print("npu-rec: no C++ compiler, the C++ kernels are left out", file=sys.stderr)

setup(
    packages=find_packages(include=["npu_rec", "npu_rec.*"]),
    # npu_rec/configs and npu_rec/launch are links to folders at the top, so that their files travel with the package
    package_data={"npu_rec": ["configs/*.yaml", "configs/*/*.yaml", "launch/*/*.j2", "launch/*/*.sh"]},
    ext_modules=extensions,
    cmdclass=commands,
)
