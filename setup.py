"""Build the native modules. Everything else about the package is in pyproject.toml."""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

WARNINGS = ["-Wall", "-Wextra", "-Werror=implicit-function-declaration"]
# Cython's generated C trips these two; they say nothing about our own lines.
WARNINGS += ["-Wno-unused-parameter", "-Wno-missing-field-initializers"]
HARDENING = ["-O2", "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-fvisibility=hidden"]


def native(name: str, source: str) -> Extension:
    return Extension(name, [source], extra_compile_args=WARNINGS + HARDENING)


extensions = [native("compart._fast", "compart/_fast.pyx")]
if sys.platform == "linux":
    extensions.append(native("compart.backend.linux._sys", "compart/backend/linux/_sys.pyx"))

setup(
    ext_modules=cythonize(
        extensions,
        build_dir=os.environ.get("COMPART_CYTHON_DIR", "build/cython"),
        compiler_directives={"language_level": 3, "embedsignature": True},
    )
)
