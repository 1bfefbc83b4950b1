"""Every test runs with shapes and types checked at each call of the library."""

import os

# Two test workers share two cores: each keeps to one thread, or they fight over both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Nearly all of the suite's time is compilation of programs that run for milliseconds, so LLVM may skip its expensive
# passes.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

from jaxtyping import install_import_hook

install_import_hook("steersman", "beartype.beartype")
