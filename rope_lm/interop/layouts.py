"""The layouts of Hugging Face transformers: the config.json and the tensors of each kind of model.

A layout converts a config.json to our model section, and back. One of our models fits a layout if this round trip gives
the same model. "Their" and "theirs" refer to transformers.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from rope_lm.interop.tensors import Heads, Tensor
from rope_lm.positional.rotary import frequencies
from rope_lm.refusal import Refusal, unknown

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]

# Their activation -> our MLP. If two of theirs mean the same, the last is the one that is written.
PLAIN = {"gelu": "gelu_exact", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
GATED = {"silu": "swiglu"}

# Their rope_type -> our encoding, and our names for its numbers.
ROPES: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("rotary", {}),
    "linear": ("rotary_linear", {"factor": "factor"}),
    "dynamic": ("rotary_dynamic", {"factor": "factor", "max_position_embeddings": "trained_length"}),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            "original_max_position_embeddings": "trained_length",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
        },
    ),
    "llama3": (
        "llama3",
        {
            "factor": "factor",
            "original_max_position_embeddings": "trained_length",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        },
    ),
}
SIZES = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "hidden": "intermediate_size",
    "vocabulary": "vocab_size",
    "length": "max_position_embeddings",
}
# Options outside the object of rotary numbers -> the number in that object which they repeat.
BESIDE = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "max_position_embeddings": "max_position_embeddings",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
LEAVES = {"": "weight", "weight": "weight", "scale": "weight", "table": "weight", "bias": "bias"}


class Layout:
    """The common part of all layouts."""

    kind: str  # model_type
    architecture: str
    prefix: str  # of every tensor but the head's; left out in files of a model without a head
    head: str  # prefix of the head's tensors
    causal: bool = True
    sizes: ClassVar[Mapping[str, str]]  # our name -> their option
    activations: ClassVar[Mapping[str, str]]
    activation: str = "hidden_act"  # the option that names the activation
    epsilon: str  # the option of the norms
    options: ClassVar[Config]  # other options that decide the computation, with their defaults
    fixed: ClassVar[Config] = {}  # options that have only this value here
    spellings: ClassVar[Mapping[str, str]] = {}  # another name of an option -> its name
    modules: ClassVar[Mapping[str, Any]]  # our path of a module -> their name, or names; {} is the layer
    outer_first: bool = True  # a linear map in a layer is [out, in], as in torch.nn.Linear
    pairing: str | None = None  # rope_lm.positional.pairing; None if nothing is turned
    by_part: bool = True  # all of q, then all of k, then all of v
    buffers: tuple[str, ...] = ()  # ends of the names of tensors that hold no parameter

    def complete(self, config: Config) -> Config:
        """Return a config.json with defaults for the options that it omits.

        Raises Refusal for an option without a counterpart here, and for one that is given differently under two names.
        """
        for other, name in self.spellings.items():
            if config.get(other) is not None:
                if config.get(name) not in (None, config[other]):
                    raise _ambiguous(f"{name}={config[name]!r}", f"{other}={config[other]!r}")
                config = config | {name: config[other]}
        fixed = {"quantization_config": None, "per_layer_config": None, "is_causal": self.causal} | self.fixed
        config = self.options | fixed | config
        for key, only in fixed.items():
            if config[key] != only:
                raise Refusal(f"config.json: {key}={config[key]!r} has no counterpart here, only {only!r} has")
        return config

    def read(self, config: Config) -> Config:
        """Return our `model` section for a complete config.json. Raises Refusal for options without a counterpart."""
        sizes = {ours: _size(config, theirs) for ours, theirs in self.sizes.items()}
        activation = str(config[self.activation])
        if activation not in self.activations:
            raise unknown(f"{self.activation} in config.json", activation, self.activations)
        return {
            **{key: sizes[key] for key in ("width", "heads", "layers", "hidden")},
            "head_size": None,
            "position": self.position(config, sizes),
            "tied": config["tie_word_embeddings"],
            "embedding_scale": 1 / math.sqrt(sizes["width"]),  # a tied table then gives logits without scaling
            "dtype": "float32",
            "remat": "products",
            "attention": {"name": "softmax", "kernel": "auto"},
            "block": {
                "epsilon": config[self.epsilon],
                "mlp": self.activations[activation],
                **self.block(config),
            },
        }

    def write(self, section: Mapping[str, Any], vocabulary: int, length: int) -> Config:
        """Return the config.json that comes closest to one of our models, for texts of `length` tokens."""
        sizes = {**section, "vocabulary": vocabulary, "length": length}
        block, names = section["block"], {mlp: name for name, mlp in self.activations.items()}
        return {
            "architectures": [self.architecture],
            "model_type": self.kind,
            "dtype": "float32",
            **{f"{name}_token_id": None for name in ("bos", "eos", "pad")},
            **self.options,
            **{theirs: sizes[ours] for ours, theirs in self.sizes.items()},
            **({self.activation: names[block["mlp"]]} if block["mlp"] in names else {}),
            self.epsilon: block["epsilon"],
            "tie_word_embeddings": section["tied"],
        }

    def position(self, config: Config, sizes: Mapping[str, int]) -> Config:
        """Return our `model.position` for a config.json."""
        raise NotImplementedError

    def block(self, config: Config) -> Config:
        """Return our `model.block` for a config.json, without the epsilon and the MLP."""
        raise NotImplementedError

    def unlike(self, section: Mapping[str, Any], causal: bool) -> str | None:
        """Return the first key that a round trip through this layout would change; None if the model fits."""
        again = self.read(self.complete(self.write(section, vocabulary=2, length=2)))
        before, after = (_flat({key: model[key] for key in ("position", "block")}) for model in (section, again))
        size = section["width"] // section["heads"]
        before |= {"attention.name": section["attention"]["name"], "causal": causal}
        before |= {"head_size": section["head_size"] or size}
        after |= {"attention.name": "softmax", "causal": self.causal, "head_size": size}
        for key in before:
            if before[key] != after.get(key):
                return f"{key} {before[key]!r} would be {after.get(key)!r}"
        return None

    def tensors(self, section: Mapping[str, Any], paths: Iterable[str]) -> list[Tensor]:
        """Return the `Tensor` of each of our parameters, which are given by their paths in our tree."""
        return [self._tensor(section, path) for path in paths]

    def _tensor(self, section: Mapping[str, Any], path: str) -> Tensor:
        module, leaf = (path, "") if path in self.modules else path.rsplit(".", 1)
        names = self.modules[module]
        theirs = tuple(f"{name}.{LEAVES[leaf]}" for name in ([names] if isinstance(names, str) else names))
        heads = None
        if module == "blocks.qkv":
            turned = int(section["width"] // section["heads"] * section["position"].get("fraction", 1))
            heads = Heads(section["heads"], self.pairing, turned, self.by_part)
        outer_first = leaf == "weight" and (self.outer_first or not path.startswith("blocks."))
        return Tensor(path, theirs, outer_first, heads)

    def received(self, section: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        """Return the section and the tensors of a file, renamed as in `modules` and reduced to parameters."""
        if not any(name.startswith(self.prefix) for name in tensors):
            tensors = {name if name.startswith(self.head) else self.prefix + name: x for name, x in tensors.items()}
        table, head = (f"{self.modules[module]}.weight" for module in ("embedding", "head"))
        if section["tied"] and {table, head} <= tensors.keys() and np.array_equal(tensors[head], tensors[table]):
            del tensors[head]
        return section, tensors

    def sent(self, config: Config, tensors: Tensors) -> Tensors:
        """Return the tensors to write: the parameters, and whatever else transformers expects in the file."""
        return tensors


class Turned(Layout):
    """The common part of the layouts whose config.json describes a rotary encoding ("turned" heads)."""

    beside: ClassVar[Mapping[str, tuple[str, float]]]  # base and part -> the option beside the others, its default
    in_part: bool = False  # True if a part of each head may be turned

    def position(self, config: Config, sizes: Mapping[str, int]) -> Config:
        size = sizes["width"] // sizes["heads"]
        if (config.get("head_dim") or size) != size:
            raise Refusal(f"config.json: head_dim={config['head_dim']}: here it is hidden_size / heads = {size}")
        kind, numbers = _rope(config, self.beside)
        base, fraction = numbers.pop("rope_theta"), numbers.pop("partial_rotary_factor")
        if fraction == 1:
            return _rotary(kind, base, numbers)
        if kind != "default" or not self.in_part:
            raise Refusal(
                f"config.json: rope_type {kind!r} of a part of each head (partial_rotary_factor {fraction}) has no "
                f"counterpart here in {self.kind}"
            )
        return {"name": "rotary_partial", "base": base, "fraction": fraction}


class Llama(Turned):
    """LlamaForCausalLM with as many key heads as query heads."""

    kind, architecture, prefix, head = "llama", "LlamaForCausalLM", "model.", "lm_head."
    sizes = SIZES
    activations, epsilon = GATED, "rms_norm_eps"
    options: ClassVar = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": None,
    }
    modules: ClassVar = {
        "embedding": "model.embed_tokens",
        "blocks.attention_norm": "model.layers.{}.input_layernorm",
        "blocks.qkv": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
        "blocks.out": "model.layers.{}.self_attn.o_proj",
        "blocks.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "blocks.gate": "model.layers.{}.mlp.gate_proj",
        "blocks.up": "model.layers.{}.mlp.up_proj",
        "blocks.down": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "head": "lm_head",
    }
    pairing, buffers = "half-split", (".rotary_emb.inv_freq",)
    beside: ClassVar = {
        "rope_theta": ("rope_theta", 10_000.0),
        "partial_rotary_factor": ("partial_rotary_factor", 1.0),
    }

    def block(self, config: Config) -> Config:
        heads = config["num_attention_heads"]
        if (config["num_key_value_heads"] or heads) != heads:
            raise Refusal(
                f"config.json: num_key_value_heads={config['num_key_value_heads']} for num_attention_heads={heads}: "
                "grouped-query attention has no counterpart here, every query head has keys of its own"
            )
        if config["attention_bias"] != config["mlp_bias"]:
            raise Refusal("config.json: attention_bias and mlp_bias differ: here all linear maps have a bias, or none")
        return {"norm": "rms", "biases": config["mlp_bias"], "residual": "pre", "transform": False}

    def write(self, section: Mapping[str, Any], vocabulary: int, length: int) -> Config:
        biases = section["block"]["biases"]
        return (
            super().write(section, vocabulary, length)
            | {"attention_bias": biases, "mlp_bias": biases, "num_key_value_heads": section["heads"]}
            | _written(section["position"], "rope_theta")
        )


class NeoX(Turned):
    """GPTNeoXForCausalLM: attention and MLP in parallel or in turn, rotary on a part of each head."""

    kind, architecture, prefix, head = "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.", "embed_out."
    sizes = SIZES
    activations, epsilon = PLAIN, "layer_norm_eps"
    options: ClassVar = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "max_position_embeddings": 2048,
        "rotary_emb_base": None,
        "rotary_pct": None,
        "rope_scaling": None,
        "rope_parameters": None,
    }
    fixed: ClassVar = {"attention_bias": True}
    modules: ClassVar = {
        "embedding": "gpt_neox.embed_in",
        "blocks.attention_norm": "gpt_neox.layers.{}.input_layernorm",
        "blocks.qkv": "gpt_neox.layers.{}.attention.query_key_value",
        "blocks.out": "gpt_neox.layers.{}.attention.dense",
        "blocks.mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        "blocks.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "blocks.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    }
    pairing, by_part = "first", False
    buffers = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
    beside: ClassVar = {
        "rope_theta": ("rotary_emb_base", 10_000.0),
        "partial_rotary_factor": ("rotary_pct", 0.25),
    }
    in_part = True

    def block(self, config: Config) -> Config:
        residual = "parallel" if config["use_parallel_residual"] else "pre"
        return {"norm": "layer", "biases": True, "residual": residual, "transform": False}

    def write(self, section: Mapping[str, Any], vocabulary: int, length: int) -> Config:
        position = section["position"]
        return (
            super().write(section, vocabulary, length)
            | {"use_parallel_residual": section["block"]["residual"] == "parallel"}
            | {"rotary_pct": position["fraction"] if position["name"] == "rotary_partial" else 1.0}
            | _written(position, "rotary_emb_base")
        )


class GPT2(Layout):
    """GPT2LMHeadModel, with learned positions."""

    kind, architecture, prefix, head = "gpt2", "GPT2LMHeadModel", "transformer.", "lm_head."
    sizes: ClassVar = {
        "width": "n_embd",
        "heads": "n_head",
        "layers": "n_layer",
        "hidden": "n_inner",
        "vocabulary": "vocab_size",
        "length": "n_positions",
    }
    activations, activation, epsilon = PLAIN, "activation_function", "layer_norm_epsilon"
    options: ClassVar = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "n_inner": None,
        "n_positions": 1024,
    }
    fixed: ClassVar = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    modules: ClassVar = {
        "embedding": "transformer.wte",
        "position": "transformer.wpe",
        "blocks.attention_norm": "transformer.h.{}.ln_1",
        "blocks.qkv": "transformer.h.{}.attn.c_attn",
        "blocks.out": "transformer.h.{}.attn.c_proj",
        "blocks.mlp_norm": "transformer.h.{}.ln_2",
        "blocks.up": "transformer.h.{}.mlp.c_fc",
        "blocks.down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }
    outer_first = False
    buffers = (".attn.bias", ".attn.masked_bias")
    spellings: ClassVar = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
    }

    def complete(self, config: Config) -> Config:
        config = super().complete(config)
        return config | {"n_inner": config["n_inner"] or 4 * _size(config, "n_embd")}

    def position(self, config: Config, sizes: Mapping[str, int]) -> Config:
        return {"name": "learned", "limit": sizes["length"], "scale": config["initializer_range"]}

    def block(self, config: Config) -> Config:
        return {"norm": "layer", "biases": True, "residual": "pre", "transform": False}

    def write(self, section: Mapping[str, Any], vocabulary: int, length: int) -> Config:
        learned = section["position"] if section["position"]["name"] == "learned" else {}
        theirs = {"limit": "n_positions", "scale": "initializer_range"}
        return super().write(section, vocabulary, length) | {theirs[key]: learned[key] for key in theirs if learned}


class RoFormer(Layout):
    """RoFormerForMaskedLM. All tokens of a single text have type 0, so that type's vector is added to the table."""

    kind, architecture, prefix, head = "roformer", "RoFormerForMaskedLM", "roformer.", "cls."
    causal = False
    sizes = SIZES
    activations, epsilon = PLAIN, "layer_norm_eps"
    options: ClassVar = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1536,
        "embedding_size": None,
    }
    fixed: ClassVar = {"rotary_value": False, "is_decoder": False, "add_cross_attention": False}
    modules: ClassVar = {
        "embedding": "roformer.embeddings.word_embeddings",
        "norm": "roformer.embeddings.LayerNorm",
        "blocks.qkv": tuple(f"roformer.encoder.layer.{{}}.attention.self.{part}" for part in ("query", "key", "value")),
        "blocks.out": "roformer.encoder.layer.{}.attention.output.dense",
        "blocks.attention_norm": "roformer.encoder.layer.{}.attention.output.LayerNorm",
        "blocks.up": "roformer.encoder.layer.{}.intermediate.dense",
        "blocks.down": "roformer.encoder.layer.{}.output.dense",
        "blocks.mlp_norm": "roformer.encoder.layer.{}.output.LayerNorm",
        "transform.dense": "cls.predictions.transform.dense",
        "transform.norm": "cls.predictions.transform.LayerNorm",
        "transform": "cls.predictions",
        "head": "cls.predictions.decoder",
    }
    pairing = "interleaved"
    table = modules["embedding"] + ".weight"
    types, waves = "roformer.embeddings.token_type_embeddings.weight", "roformer.encoder.embed_positions.weight"
    bias, decoder = "cls.predictions.bias", "cls.predictions.decoder"

    def position(self, config: Config, sizes: Mapping[str, int]) -> Config:
        return {"name": "rotary", "base": 10_000.0}

    def block(self, config: Config) -> Config:
        if (config["embedding_size"] or config["hidden_size"]) != config["hidden_size"]:
            raise Refusal(f"config.json: embedding_size={config['embedding_size']}: here it is hidden_size")
        return {"norm": "layer", "biases": True, "residual": "post", "transform": True}

    def write(self, section: Mapping[str, Any], vocabulary: int, length: int) -> Config:
        return super().write(section, vocabulary, length) | {"type_vocab_size": 1}

    def received(self, section: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        section, tensors = super().received(section, tensors)
        types, waves = tensors.pop(self.types, np.zeros((1, 1), np.float32)), tensors.pop(self.waves, None)
        if waves is not None and not np.allclose(waves, _sinusoids(*waves.shape), atol=1e-4):
            raise Refusal(f"{self.waves} does not hold the sinusoids of base 10,000 that RoFormer turns by")
        if f"{self.decoder}.bias" in tensors:  # added to the logits; the other is a copy or missing
            tensors[self.bias] = tensors.pop(f"{self.decoder}.bias")
        if types[0].any() and self.table in tensors:
            if section["tied"]:  # logits use the table without the type: a head of its own now
                tensors.setdefault(f"{self.decoder}.weight", tensors[self.table])
                section = {**section, "tied": False}
            tensors[self.table] = tensors[self.table] + types[0]
        return section, tensors

    def sent(self, config: Config, tensors: Tensors) -> Tensors:
        size = config["hidden_size"] // config["num_attention_heads"]
        untied = {} if config["tie_word_embeddings"] else {f"{self.decoder}.bias": tensors[self.bias]}
        return {
            **tensors,
            **untied,
            self.types: np.zeros((1, config["hidden_size"]), np.float32),
            self.waves: _sinusoids(config["max_position_embeddings"], size),
        }


LAYOUTS: dict[str, Layout] = {layout.kind: layout for layout in (Llama(), NeoX(), GPT2(), RoFormer())}


def _size(config: Mapping[str, Any], key: str) -> int:
    if type(config.get(key)) is not int or config[key] < 1:
        raise Refusal(f"config.json: {key} is {config.get(key)!r}, it must be a whole number of at least 1")
    return config[key]


def _rope(config: Config, beside: Mapping[str, tuple[str, float]]) -> tuple[str, Config]:
    """Return rope_type and its numbers, including the base and the rotated part of a head, as transformers reads them.

    Raises Refusal if a number is given twice with different values: versions of transformers disagree on which to read.
    """
    place, given = _rope_object(config)
    kind = str(given.pop("rope_type"))
    if kind not in ROPES:
        raise unknown("rope_type in config.json", kind, ROPES)
    length = config["max_position_embeddings"]
    silent = {
        "max_position_embeddings": length,
        "original_max_position_embeddings": config.get("original_max_position_embeddings") or length,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    options = {key: default if config.get(name) is None else config[name] for key, (name, default) in beside.items()}
    numbers = {key: value for key, value in silent.items() if key in ROPES[kind][1]} | options | given
    for option, key in BESIDE.items():
        if config.get(option) is not None and config[option] != numbers.get(key, config[option]):
            other = f"{key}={numbers[key]!r} in {place}" if key in given else f"{beside[key][0]}={numbers[key]!r}"
            raise _ambiguous(f"{option}={config[option]!r}", other)
    return kind, numbers


def _rope_object(config: Config) -> tuple[str, Config]:
    """Return the name and the content of `rope_parameters` or, in older files, `rope_scaling`, without nulls."""
    found: dict[str, Config] = {}
    for place in ("rope_parameters", "rope_scaling"):
        given = config[place]
        if given is not None and not isinstance(given, Mapping):
            raise Refusal(f"config.json: {place} is {given!r}, it must be an object with rope_type and its numbers")
        if not given:
            continue
        numbers = {key: value for key, value in given.items() if value is not None}
        older = numbers.pop("type", numbers.get("rope_type", "default"))
        if numbers.setdefault("rope_type", older) != older:
            raise _ambiguous(f"rope_type={numbers['rope_type']!r}", f"type={older!r} in {place}")
        found[place] = numbers
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise _ambiguous(*(f"{place}={config[place]!r}" for place in found))
    return next(iter(found.items()), ("", {"rope_type": "default"}))


def _ambiguous(one: str, other: str) -> Refusal:
    return Refusal(
        f"config.json: {one} and {other} differ, and versions of transformers read one or the other: keep one"
    )


def _rotary(kind: str, base: float, numbers: Mapping[str, Any]) -> Config:
    """Return our `model.position` for a rope_type and its numbers."""
    name, keys = ROPES[kind]
    for key in numbers.keys() ^ keys.keys():
        raise Refusal(
            f"config.json: {key} has no counterpart here for rope_type {kind!r}, which has {', '.join(keys) or 'none'}"
            if key in numbers
            else f"config.json: rope_type {kind!r} lacks {key}"
        )
    return {"name": name, "base": base, **{ours: numbers[theirs] for theirs, ours in keys.items()}}


def _written(position: Mapping[str, Any], base: str) -> Config:
    """Return the options of a rotary encoding; none for others."""
    kinds = {name: kind for kind, (name, _) in ROPES.items()} | {"rotary_partial": "default"}
    if position["name"] not in kinds:
        return {}
    kind = kinds[position["name"]]
    numbers = {theirs: position[ours] for theirs, ours in ROPES[kind][1].items()}
    length = {key: numbers.pop(key) for key in ("max_position_embeddings",) if key in numbers}
    scaling = {} if kind == "default" else {"rope_scaling": {"rope_type": kind, **numbers}}
    return {base: position["base"], **length, **scaling}


def _sinusoids(count: int, size: int) -> np.ndarray:
    """Return the sines, then the cosines, of the angles of each position: [count size]."""
    angle = np.arange(count)[:, None] * frequencies(size, 10_000.0)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"block.norm": ..., ...}, names first."""
    pairs = [(f"{section}.{key}", value) for section, row in tree.items() for key, value in row.items()]
    return dict(sorted(pairs, key=lambda pair: not pair[0].endswith(".name")))
