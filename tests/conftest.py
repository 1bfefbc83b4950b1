"""Every test runs with shapes and types checked at each call of the library."""

import gc
import importlib.metadata
import os
import tempfile
from pathlib import Path

import pytest

# Two test workers share two cores: each keeps to one thread, or they fight over both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Nearly all of the suite's time is compilation of programs that then run for milliseconds, so the compiler is told not
# to try hard; that halves it. The flags are those of the releases named here: XLA ends a process that gives it an
# unknown one.
if importlib.metadata.version("jax").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )
# Workers, and the processes that tests start, share what they compile; the next run of the suite does too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "steersman-tests-compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**31))

from jaxtyping import install_import_hook

install_import_hook("steersman", "beartype.beartype")

#: A process may hold 65,530 memory maps under Linux's default, and compiled programs take several each; a compiler that
#: gets no more of them crashes.
_MOST_MAPS = 25_000


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()
