"""The environment of a process. Settings that can change results are either pinned or recorded."""

import os
import re
from typing import Any

from rope_lm.refusal import Refusal

# Settings of JAX that change results; each can be set by an environment variable too. Not every JAX version has all.
PINNED = {
    "jax_enable_x64": False,
    "jax_enable_custom_prng": False,
    "jax_default_dtype_bits": "64",  # of jax_enable_x64
    "jax_default_matmul_precision": None,  # the platform's
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_disable_most_optimizations": False,
    "jax_disable_jit": False,
}
# Variables that JAX, XLA and the libraries below them read, and those among them that change no number.
READ = re.compile(r"(JAX|XLA|LIBTPU|CUBLAS|CUDNN|NVIDIA_TF32|TF_CUDNN|TF_ENABLE|DNNL|ONEDNN)_|NPROC$")
UNRELATED = re.compile("_(LOG|DIR|CACHE|DUMP|TRACEBACK|DEBUG|PLATFORM|DEVICE|VISIBLE|CLIENT|CHECK|COORDINATOR|PROCESS)")
# Flags of XLA without effect on numbers, or recorded as the number of devices.
HARMLESS = re.compile(r"--xla_(dump|force_host_platform_device_count|cpu_collective_call|gpu_cuda_data_dir)")


def pin() -> None:
    """Set JAX to PINNED, overriding the environment and the calling program.

    Raises Refusal inside a context manager that changes one of them, such as `jax.enable_x64(True)`.
    """
    import jax  # here, because processes that only start others do not need it

    for name, value in PINNED.items():
        if name not in jax.config.values:
            continue
        jax.config.update(name, value)
        found = getattr(jax.config, name, value)
        if getattr(found, "value", found) != value:
            raise Refusal(f"{name} is {found} in a context of the calling program: leave it, every run has {value}")


def devices() -> list[Any]:
    """Return the devices of the platform. Raises Refusal if JAX_PLATFORMS names one that is not here."""
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.values["jax_platforms"]
        if not asked:
            raise
        why = f" ({error})" if str(error) else ""
        raise Refusal(
            f"JAX_PLATFORMS={asked}: there is no such device here{why}: unset it, or run scripts/setup.sh where the "
            "device is"
        ) from error


def recorded() -> dict[str, str]:
    """Return the environment variables that may change results and are not pinned, with XLA's flags sorted."""
    pinned = {name.upper() for name in PINNED}
    names = (name for name in sorted(os.environ) if READ.match(name) and not UNRELATED.search(name))
    found = {name: os.environ[name] for name in names if name not in pinned}
    if flags := [flag for flag in sorted(found.pop("XLA_FLAGS", "").split()) if not HARMLESS.match(flag)]:
        found["XLA_FLAGS"] = " ".join(flags)
    return found
