"""A trained δ-mem adapter on disk: its settings (`delta_mem_config.json`) and its tensors (the official
`delta_mem_adapter.pt`, read with `weights_only`, or our `adapter.safetensors` with the same keys). It knows
which keys there must be and their shapes; it knows
nothing of what they compute: that is `reference.py` (PyTorch) and `island.py` (ONNX).

A key is `model.layers.{i}.self_attn.{name}`. With r the rank, H the state heads, R = H·r, G = R for gates per
row and H for gates per head, `hidden` the attention's input and `out(p)` the width of projection p:

    memory_q_proj, memory_k_proj, memory_v_proj   [R, hidden]
    beta_proj [G, hidden], beta_bias [G]          and lambda_proj, lambda_bias where λ is not coupled to β
    delta_{p}_proj                                [out(p), R] for p in q, k, v, o; may be absent if not in use
    delta_o_rmsnorm_weight                        [out(o)] with delta_o_rmsnorm and o in use
    delta_scale_raw                               [1], or [4] in the order q k v o, with trainable_delta_scale
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltamem_export.errors import AdapterError, first_line

CONFIG_FILE = "delta_mem_config.json"
OFFICIAL_FILE = "delta_mem_adapter.pt"
SAFETENSORS_FILE = "adapter.safetensors"
FORMS = {"safetensors": SAFETENSORS_FILE, "official": OFFICIAL_FILE}
_METADATA = {"format": "deltamem-adapter"}

DELTA_HEADS = ("q", "k", "v", "o")
UPDATE_MODES = ("standard", "lambda_outside", "no_lambda")
WRITE_GRANULARITIES = ("token", "message_mean", "sentence_mean")
MAX_RANK = 128
MAX_HEADS = 256
MAX_LAYERS = 1024

_KEY = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.self_attn\.([a-z_]+)")

# Settings that choose starting values for training. They do not change what a trained adapter computes.
_INITIALISATION = frozenset(
    {
        "beta_bias_init",
        "output_init",
        "base_slice_ref_width",
        "online_gain",
        "delta_scale_init",
        "lambda_bias_init",
    }
)

# Settings of experiments that the format still carries, with the one value at which they are off.
_ARCHIVED: Mapping[str, Any] = {
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_reader_layers": [],
    "latent_memory_layers": [],
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "memory_write_proposals_per_message": 2,
    "synthetic_memory_slots": 1,
    "global_memory_mode": "shared_rw",
    "global_memory_merge_mode": "gated_residual",
    "global_memory_read_top_k": 0,
    "slot_read_top_k": 0,
    "target_modules": ["self_attn"],
    "delta_scale_parameterization": "alpha_over_rank",
}

# Settings of those experiments that mean nothing while the experiment is off.
_DORMANT = frozenset(
    {
        "memory_partition_routing",
        "memory_partition_basis",
        "tie_memory_partition_read_write",
        "memory_partition_read_mode",
        "memory_partition_sigmoid_gate_bias_init",
        "global_memory_gate_bias_init",
        "global_memory_read_logit_bias",
        "memory_reader_hidden_size",
        "memory_reader_residual_scale",
        "memory_reader_read_only",
        "latent_memory_hidden_size",
        "latent_memory_residual_scale",
        "latent_memory_slots",
        "latent_memory_init_std",
        "latent_gate_init",
    }
)

# No default is taken for these from a file: a wrong guess would be a wrong answer without a word.
_REQUIRED = (
    "rank",
    "alpha",
    "normalize_qk",
    "couple_lambda",
    "state_update_mode",
    "rankwise_gates",
    "delta_heads",
)


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that matter at run time, under the names that `delta_mem_config.json` gives them.

    Raises:
        AdapterError: a value of the wrong type or out of range; the message names the setting.
    """

    rank: int
    alpha: float
    num_state_heads: int = 1
    normalize_qk: bool = True
    couple_lambda: bool = True
    state_update_mode: str = "standard"
    rankwise_gates: bool = True
    memory_write_granularity: str = "token"
    target_layers: tuple[int, ...] = ()  # empty: every layer of the backbone
    delta_heads: tuple[str, ...] = ("q", "o")  # in the order q k v o
    delta_o_rmsnorm: bool = False
    delta_o_rmsnorm_eps: float = 1e-6
    trainable_delta_scale: bool = False
    delta_scale_max: float = 2.0
    delta_scale_granularity: str = "layer"  # "layer": one raw value, "head": four, in the order q k v o

    def __post_init__(self) -> None:
        for name in ("rank", "num_state_heads"):
            _expect(
                isinstance(getattr(self, name), int) and not isinstance(getattr(self, name), bool),
                name,
                getattr(self, name),
                "an integer",
            )
        _expect(1 <= self.rank <= MAX_RANK, "rank", self.rank, f"1 to {MAX_RANK}")
        _expect(
            1 <= self.num_state_heads <= MAX_HEADS,
            "num_state_heads",
            self.num_state_heads,
            f"1 to {MAX_HEADS}",
        )
        for name in (
            "normalize_qk",
            "couple_lambda",
            "rankwise_gates",
            "delta_o_rmsnorm",
            "trainable_delta_scale",
        ):
            _expect(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for name in ("alpha", "delta_o_rmsnorm_eps", "delta_scale_max"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _expect(number, name, value, "a finite number")
            object.__setattr__(self, name, float(value))
        _expect(self.delta_o_rmsnorm_eps >= 0, "delta_o_rmsnorm_eps", self.delta_o_rmsnorm_eps, "0 or more")
        _expect_choice("state_update_mode", self.state_update_mode, UPDATE_MODES)
        _expect_choice("memory_write_granularity", self.memory_write_granularity, WRITE_GRANULARITIES)
        _expect_choice("delta_scale_granularity", self.delta_scale_granularity, ("layer", "head"))

        heads = self.delta_heads
        good = isinstance(heads, (list, tuple)) and len(heads) > 0 and all(p in DELTA_HEADS for p in heads)
        _expect(good and len(set(heads)) == len(heads), "delta_heads", heads, "some of q, k, v, o, each once")
        object.__setattr__(self, "delta_heads", tuple(p for p in DELTA_HEADS if p in heads))

        layers = self.target_layers
        good = isinstance(layers, (list, tuple)) and all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MAX_LAYERS for i in layers
        )
        _expect(
            good and len(set(layers)) == len(layers),
            "target_layers",
            layers,
            'distinct layer numbers, or [] or "off" for all',
        )
        object.__setattr__(self, "target_layers", tuple(sorted(layers)))

    @property
    def read_width(self) -> int:
        """R = heads · rank: the width of a token's read over all state heads."""
        return self.num_state_heads * self.rank

    @property
    def gates_per_head(self) -> int:
        """Gates of one state head: r with gates per row, else 1."""
        return self.rank if self.rankwise_gates else 1

    @property
    def gate_width(self) -> int:
        """G: gates of one token over all state heads."""
        return self.num_state_heads * self.gates_per_head

    @property
    def writes_spans(self) -> bool:
        """Whether a write covers a span of tokens (a message, a sentence) and not each token."""
        return self.memory_write_granularity != "token"

    @property
    def proposal_width(self) -> int:
        """W: what the edit and gate networks make of one hidden vector, q, k, v and the gates' logits."""
        own_lambda = not self.couple_lambda and self.state_update_mode != "no_lambda"
        return 3 * self.read_width + self.gate_width * (2 if own_lambda else 1)

    @property
    def scaling(self) -> float:
        """alpha / r, the fixed factor on every correction."""
        return self.alpha / self.rank

    def memory_layers(self, num_layers: int, without: Sequence[int] = ()) -> tuple[int, ...]:
        """The layers of a backbone of `num_layers` that carry a memory, ascending. `without` are layers that have no
        attention (convolutions); no memory can be there, and "all layers" leaves them out.

        Raises:
            AdapterError: a target layer that the backbone does not have, or that has no attention.
        """
        if not self.target_layers:
            return tuple(i for i in range(num_layers) if i not in without)
        _expect(
            self.target_layers[-1] < num_layers,
            "target_layers",
            list(self.target_layers),
            f"layers of this backbone, 0 to {num_layers - 1}",
        )
        _expect(
            not set(self.target_layers) & set(without),
            "target_layers",
            list(self.target_layers),
            f"layers with attention; {_ranges(sorted(without))} of this backbone have none",
        )
        return self.target_layers

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> AdapterConfig:
        """Reads the settings of a `delta_mem_config.json`. Nothing in it is ignored without being known to be
        without effect.

        Raises:
            AdapterError: names a setting that is missing, unknown, of a wrong value, or of an experiment that
            is not implemented.
        """
        ours = {f.name for f in fields(cls)}
        for name, neutral in _ARCHIVED.items():
            if name in settings and _plain(settings[name]) != neutral:
                raise AdapterError(
                    f"setting {name} is {settings[name]!r}; only {neutral!r} is implemented. The adapter was "
                    "trained with a variant "
                    "of δ-mem that this exporter does not know, so its results could not be right"
                )
        for name in settings:
            if name not in ours and name not in _ARCHIVED and name not in _DORMANT and name not in _INITIALISATION:
                raise AdapterError(
                    f"setting {name} is {settings[name]!r}; this exporter does not know that setting, so it "
                    "cannot tell whether it "
                    "changes results. Remove it if it has no effect at run time"
                )
        for name in _REQUIRED:
            if name not in settings:
                raise AdapterError(f"setting {name} is missing; a {CONFIG_FILE} must say it")
        values = {name: value for name, value in settings.items() if name in ours}
        if values.get("target_layers") in ("off", None):
            values["target_layers"] = ()
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class AttentionShape:
    """The widths of one attention layer of a backbone: its input and the outputs of its four projections."""

    hidden: int
    q: int
    k: int
    v: int
    o: int

    def out(self, head: str) -> int:
        """The width that the correction of `head` (q, k, v or o) must have."""
        return int(getattr(self, head))


@dataclass(frozen=True)
class Adapter:
    """Settings and tensors that fit each other. `layers[i][name]` is the tensor of key
    `model.layers.{i}.self_attn.{name}`."""

    config: AdapterConfig
    layers: Mapping[int, Mapping[str, Tensor]]
    source: str = field(default="adapter", compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise AdapterError(f"{self.source}: no layer has tensors; expected keys model.layers.<i>.self_attn.<name>")
        first = min(self.layers)
        hidden = self._hidden(first)
        for i, tensors in sorted(self.layers.items()):
            # Without a backbone, the widths of the corrections are whatever the tensors say; their other side
            # is checked.
            widths = {
                head: _rows(tensors.get(f"delta_{head}_proj"), tensors.get("delta_o_rmsnorm_weight"), head)
                for head in DELTA_HEADS
            }
            self._check_layer(i, AttentionShape(hidden, **widths))
        wanted = self.config.target_layers
        if wanted and tuple(sorted(self.layers)) != wanted:
            raise AdapterError(
                f"{self.source}: tensors for layers {sorted(self.layers)}, but target_layers is {list(wanted)}"
            )

    @property
    def hidden_size(self) -> int:
        """The width of the attention's input that this adapter was trained on."""
        return self._hidden(min(self.layers))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every (key, tensor), layers ascending, names sorted."""
        for i in sorted(self.layers):
            for name in sorted(self.layers[i]):
                yield f"model.layers.{i}.self_attn.{name}", self.layers[i][name]

    def check_backbone(self, shapes: Sequence[AttentionShape | None]) -> tuple[int, ...]:
        """Checks the adapter against a backbone's layers (None: a layer without attention) and returns those that carry a
        memory.

        Raises:
            AdapterError: another number of layers, or a width that differs; names the key, the shape found
            and the one expected.
        """
        wanted = self.config.memory_layers(len(shapes), [i for i, shape in enumerate(shapes) if shape is None])
        if tuple(sorted(self.layers)) != wanted:
            raise AdapterError(
                f"{self.source}: has layers {_ranges(sorted(self.layers))}, but the backbone has "
                f"{len(shapes)} layers and the settings "
                f"ask for {_ranges(list(wanted))}; this adapter was trained for another backbone"
            )
        for i in wanted:
            shape = shapes[i]
            assert shape is not None
            self._check_layer(i, shape)
        return wanted

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Adapter:
        """Reads an adapter directory, official or ours. Tensors come back as float32 on the CPU, whatever
        they were stored as.

        Raises:
            FileNotFoundError: no such directory, or a file that must be there is not.
            AdapterError: names the setting or key, what was found and what was expected.
        """
        directory = Path(directory)
        config = _read_config(directory)
        forms = stored_forms(directory)
        if not forms:
            raise FileNotFoundError(f"{directory}: holds neither {SAFETENSORS_FILE} nor {OFFICIAL_FILE}")
        path = directory / FORMS[forms[0]]
        return cls.from_tensors(config, _read_tensors(path), source=str(path))

    @classmethod
    def from_tensors(cls, config: AdapterConfig, tensors: Mapping[str, Tensor], source: str = "adapter") -> Adapter:
        """Sorts flat keys into layers and checks all of them.

        Raises:
            AdapterError: a missing, extra, misshapen or non-finite tensor.
        """
        layers: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise AdapterError(f"{source}: unexpected key {key}; expected model.layers.<i>.self_attn.<name>")
            layers.setdefault(int(match[1]), {})[match[2]] = tensor.detach().to("cpu", torch.float32).contiguous()
        return cls(config, layers, source)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `delta_mem_config.json` and `adapter.safetensors` (float32) into `directory`, which is made
        if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file(dict(self.tensors()), directory / SAFETENSORS_FILE, metadata=_METADATA)

    def _hidden(self, i: int) -> int:
        tensor = self.layers[i].get("memory_q_proj")
        if tensor is None or tensor.ndim != 2:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise AdapterError(
                f"{self.source}: key model.layers.{i}.self_attn.memory_q_proj is {found}, expected "
                f"[{self.config.read_width}, hidden]"
            )
        return int(tensor.shape[1])

    def _check_layer(self, i: int, shape: AttentionShape) -> None:
        required, optional = expected_shapes(self.config, shape)
        tensors = self.layers[i]
        for name in required:
            if name not in tensors:
                raise AdapterError(
                    f"{self.source}: key model.layers.{i}.self_attn.{name} is missing, expected a tensor of "
                    f"{_show(required[name])}"
                )
        for name, tensor in tensors.items():
            key = f"model.layers.{i}.self_attn.{name}"
            want = required.get(name) or optional.get(name)
            if want is None:
                raise AdapterError(
                    f"{self.source}: unexpected key {key} {list(tensor.shape)}; these settings have no such tensor"
                )
            if tuple(tensor.shape) != want:
                raise AdapterError(f"{self.source}: key {key} has shape {list(tensor.shape)}, expected {list(want)}")
            finite = torch.isfinite(tensor)
            if not bool(finite.all()):
                where = (~finite).nonzero()[0].tolist()
                raise AdapterError(
                    f"{self.source}: key {key} holds {tensor[tuple(where)].item()} at {where}, expected finite numbers"
                )


def expected_shapes(
    config: AdapterConfig, shape: AttentionShape
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The tensors that a layer must have, and those that it may have without effect: name → shape."""
    read, gate, hidden = config.read_width, config.gate_width, shape.hidden
    required: dict[str, tuple[int, ...]] = {f"memory_{p}_proj": (read, hidden) for p in ("q", "k", "v")}
    required |= {"beta_proj": (gate, hidden), "beta_bias": (gate,)}
    if not config.couple_lambda:
        required |= {"lambda_proj": (gate, hidden), "lambda_bias": (gate,)}
    required |= {f"delta_{p}_proj": (shape.out(p), read) for p in config.delta_heads}
    optional: dict[str, tuple[int, ...]] = {
        f"delta_{p}_proj": (shape.out(p), read) for p in DELTA_HEADS if p not in config.delta_heads
    }
    if config.delta_o_rmsnorm:
        (required if "o" in config.delta_heads else optional)["delta_o_rmsnorm_weight"] = (shape.o,)
    if config.trainable_delta_scale:
        required["delta_scale_raw"] = (1,) if config.delta_scale_granularity == "layer" else (len(DELTA_HEADS),)
    return required, optional


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], to: str | None = None) -> tuple[Path, int]:
    """Writes an adapter in another form: `official` (a dict of tensors by `torch.save`) or `safetensors`. Tensors keep their
    bits and dtypes, the settings file its bytes.

    Args:
        source: the adapter's folder.
        target: the folder to write to, made if need be; it may be `source`.
        to: the form; the other one if not given.

    Returns:
        the file of tensors that was written, and how many there are.

    Raises:
        FileNotFoundError: no such folder, or a file that must be there is not.
        AdapterError: the source is not a sound adapter, is in both forms while `to` is not given, or the target holds
            tensors already.
    """
    source, target = Path(source), Path(target)
    config = _read_config(source)
    forms = stored_forms(source)
    if not forms:
        raise FileNotFoundError(f"{source}: holds neither {SAFETENSORS_FILE} nor {OFFICIAL_FILE}")
    if to is None and len(forms) > 1:
        raise AdapterError(
            f"{source}: holds both {SAFETENSORS_FILE} and {OFFICIAL_FILE}; say which form to write with --to"
        )
    to = to or next(form for form in FORMS if form not in forms)
    path = source / FORMS[next((form for form in forms if form != to), to)]
    tensors = _read_tensors(path)
    adapter = Adapter.from_tensors(config, tensors, source=str(path))
    for form in FORMS:
        found = target / FORMS[form]
        if found.exists() and found.resolve() != path.resolve():
            raise AdapterError(f"{found}: exists already; choose another folder or remove it")
    target.mkdir(parents=True, exist_ok=True)
    settings = (source / CONFIG_FILE).read_bytes()
    if (target / CONFIG_FILE).resolve() != (source / CONFIG_FILE).resolve():
        (target / CONFIG_FILE).write_bytes(settings)
    ordered = {key: tensors[key].detach().clone().contiguous() for key, _ in adapter.tensors()}
    written = target / FORMS[to]
    if to == "official":
        torch.save(ordered, written)
    else:
        save_file(ordered, written, metadata=_METADATA)
    return written, len(ordered)


def stored_forms(directory: Path) -> list[str]:
    """The forms that an adapter folder holds its tensors in; the first is the one that `Adapter.load` reads."""
    return [form for form, file in FORMS.items() if (directory / file).is_file()]


def _read_config(directory: Path) -> AdapterConfig:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such adapter directory")
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; an adapter directory holds {CONFIG_FILE} and its tensors")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path}: not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{path}: is {type(settings).__name__}, expected a JSON object")
    try:
        return AdapterConfig.from_dict(settings)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """As they are stored, of whatever dtype."""
    return _read_official(path) if path.name == OFFICIAL_FILE else _read_safetensors(path)


def _read_official(path: Path) -> dict[str, Tensor]:
    """`weights_only`: the file may hold tensors and containers of tensors, and no code."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or malicious pickle makes the unpickler raise
        raise AdapterError(f"{path}: not a file of tensors alone ({first_line(error)})") from error
    if not isinstance(loaded, dict):
        raise AdapterError(f"{path}: holds a {type(loaded).__name__}, expected a dict from keys to tensors")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            raise AdapterError(f"{path}: key {key!r} holds {_kind(value)}, expected a tensor of floating-point numbers")
    return loaded


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file ({error})") from error
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise AdapterError(f"{path}: key {key} holds {_kind(value)}, expected a tensor of floating-point numbers")
    return tensors


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _rows(projection: Tensor | None, norm: Tensor | None, head: str) -> int:
    if projection is not None and projection.ndim == 2:
        return int(projection.shape[0])
    return int(norm.shape[0]) if head == "o" and norm is not None and norm.ndim == 1 else 0


def _show(shape: tuple[int, ...]) -> str:
    """A width of 0 is one that only a backbone could tell."""
    return "[" + ", ".join(str(size) if size else "width of the projection" for size in shape) + "]"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _ranges(numbers: list[int]) -> str:
    return f"0 to {numbers[-1]}" if numbers and numbers == list(range(len(numbers))) else str(numbers)


def _expect(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise AdapterError(f"setting {name} is {found!r}, expected {expected}")


def _expect_choice(name: str, found: object, choices: tuple[str, ...]) -> None:
    _expect(isinstance(found, str) and found in choices, name, found, " or ".join(map(repr, choices)))
