"""What a process imports before commands are forked from it: packages that take long, without starting a thread."""

import warnings

import absl.flags  # noqa: F401
import flax.nnx  # noqa: F401
import grain  # noqa: F401
import jax  # noqa: F401
import ml_collections.config_flags  # noqa: F401
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401

warnings.filterwarnings("ignore", ".*os.fork.*")  # JAX warns of threads, which only its backends start
