"""All decisions that depend on the platform, in one place. They change results by rounding only."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rope_lm.kernels.softmax import KERNELS
from rope_lm.positional import Effects
from rope_lm.refusal import Refusal, unknown

UNROLLED = {"cpu": 4, "gpu": 12}  # most layers to unroll, so that compiling stays short
PIECE = 512  # least tokens in a piece of a CPU's batch: its activations then fit a core's cache


class Execution(NamedTuple):
    """Decisions made for a platform, recorded in the manifest."""

    kernel: str  # of attention
    members_in_turn: bool  # one member of the ensemble after another, instead of all at once
    pieces: int  # equal parts of a batch that are computed one after another
    unroll: bool  # True to write the layers out, False to loop over them
    compiler_options: Mapping[str, bool]  # of every program
    init_options: Mapping[str, int]  # of the program that draws initial values, in addition


def choose(
    config: Mapping[str, Any],
    effects: Effects,
    *,
    platform: str,
    mesh: Mapping[str, int],
    deterministic: bool,
) -> Execution:
    """Choose how a run executes.

    `config`: the whole config of the run. `effects`: those of its encoding. `platform`: as JAX names it. `mesh`: sizes
    of its axes, which must divide the batch. `deterministic`: True to ask XLA for the same bits in every run. Raises
    Refusal for a kernel that is unknown or cannot run on this platform.
    """
    model, accumulation = config["model"], config["optimizer"]["accumulation_steps"]
    layers, on_cpu = model["layers"], platform == "cpu"
    kernel = _kernel(model, effects, platform, apart=mesh["member"])
    # cuDNN adds one bias to the logits of all rows, so members computed at once cannot have biases of their own.
    fused_bias = kernel == "cudnn" and effects.bias
    pieces = accumulation
    if on_cpu:
        rows = config["data"]["batch"] // accumulation // (mesh["data"] * mesh["fsdp"])
        pieces *= _pieces(rows, config["data"]["length"])
    # On a GPU sums otherwise depend on the order in which threads finish.
    options = {"xla_gpu_deterministic_ops": True} if deterministic and platform == "gpu" else {}
    return Execution(
        kernel=kernel,
        # A CPU's matrix products are a third slower with a batch dimension, even of one.
        members_in_turn=(on_cpu or fused_bias) and mesh["member"] == 1,
        pieces=pieces,
        unroll=layers <= UNROLLED.get(platform, 0) and model["remat"] != "full",
        compiler_options=options,
        # It runs once, and LLVM's later passes take longer than they save; the bits stay the same.
        init_options={"xla_backend_optimization_level": 1} if on_cpu else {},
    )


def _pieces(rows: int, length: int) -> int:
    """Return how many equal pieces a device's rows are cut into: as many as have PIECE or more tokens each."""
    counts = [count for count in range(1, rows + 1) if rows % count == 0 and rows // count * length >= PIECE]
    return max(counts, default=1)


def _kernel(model: Mapping[str, Any], effects: Effects, platform: str, apart: int) -> str:
    """Return the kernel that model.attention.kernel names, or for "auto" the fastest that fits.

    JAX calls both NVIDIA and AMD GPUs "gpu", so on an AMD GPU kernel=xla must be given. `apart`: devices that members
    are spread over.
    """
    if "kernel" not in model["attention"]:
        return str(model["attention"].get("name"))  # attention with a single implementation
    kernel, head_size, dtype = model["attention"]["kernel"], effects.head_size, model["dtype"]
    many = effects.score or (effects.bias and apart > 1)  # biases that differ between rows computed at once
    fused = platform == "gpu" and dtype == "bfloat16" and not many
    sized = head_size % 8 == 0 and head_size <= 128  # supported by every GPU's cuDNN
    if kernel == "auto":
        return "cudnn" if fused and sized else "blocked" if platform == "cpu" else "xla"
    if kernel not in KERNELS:
        raise unknown("model.attention.kernel", kernel, ["auto", *KERNELS])
    if kernel == "cudnn" and not fused:
        raise Refusal(
            "model.attention.kernel=cudnn runs on NVIDIA GPUs in bfloat16 and adds one bias to the logits of all rows, "
            f"not on {platform} in {dtype}{' with many' if many else ''}: choose auto, xla or blocked"
        )
    if kernel == "cudnn" and not sized:
        raise Refusal(
            "model.attention.kernel=cudnn takes heads whose size is a multiple of 8 and at most 128, here it is "
            f"{head_size}: choose auto or xla, or another model.heads or model.head_size"
        )
    return kernel
