"""A frozen decoder on local disk, loaded once: its configuration, its weights, the widths of its attention,
and a hash of what it is. It knows nothing of ONNX or of memories.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from deltamem_export.decoder import attention_shapes
from deltamem_export.errors import ExportError, first_line
from deltamem_export.families import check_settings, context_length, find_family, head_dim


@dataclass(frozen=True)
class Geometry:
    """The sizes that the bundle's manifest records of a backbone."""

    architecture: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int


@dataclass(frozen=True)
class Tokens:
    """Special token ids; `eos` lists every id that ends a text."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


class Backbone:
    """A decoder in evaluation mode, with the dtype that its files have, never trained here."""

    def __init__(self, directory: Path, config: PretrainedConfig, model: nn.Module) -> None:
        self.directory = directory
        self.config = config
        self.model = model
        self.geometry = _geometry(config)
        self.tokens = _tokens(directory, config)
        self.shapes = attention_shapes(model)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], any_family: bool = False) -> Backbone:
        """Reads a Hugging Face model folder, without a network and without code from the folder.

        Args:
            directory: the folder.
            any_family: take also what the builder cannot build, for a graph that comes from elsewhere.

        Raises:
            FileNotFoundError: no such folder, or no config.json in it.
            ExportError: a family that is not supported, unreadable or missing weights.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                f"{directory / 'config.json'}: not found; a backbone is a Hugging Face model folder"
            )
        config = read_config(directory, any_family)
        verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model: Any
            report: dict[str, Any]
            model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                directory, config=config, local_files_only=True, dtype="auto", output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ExportError(f"{directory}: the weights cannot be loaded ({first_line(error)})") from error
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bar:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        for problem in ("missing_keys", "mismatched_keys"):
            if report.get(problem):
                names = ", ".join(sorted(map(str, report[problem]))[:3])
                raise ExportError(
                    f"{directory}: {problem.replace('_', ' ')}: {names}; the weights do not fit config.json"
                )
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not _finite(tensor):
                raise ExportError(f"{directory}: weight {name} holds NaN or infinity; the backbone's files are damaged")
        _settle_embedding_scale(model)
        return cls(directory, config, model.eval().requires_grad_(False))

    @cached_property
    def weights_digest(self) -> str:
        """BLAKE3 over the weights as the files hold them: names, dtypes, shapes, bytes; 64 hex digits."""
        return digest_tensors(self.model.state_dict())

    def digest(self, setting: str) -> str:
        """BLAKE3 over the weights and the precision setting that they will run at, 64 hex digits."""
        return str(blake3(f"{setting}\n{self.weights_digest}".encode()).hexdigest())

    def to_float32(self) -> None:
        """Widens the weights in place, for a comparison in float32. The digest stays that of the files."""
        assert self.weights_digest
        self.model.float()


def read_config(directory: Path, any_family: bool = False) -> PretrainedConfig:
    """The folder's configuration.

    Raises:
        ExportError: unreadable, or of a family that is not supported.
    """
    path = directory / "config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        architecture = (said.get("architectures") or ["(none)"])[0]
        # Before transformers reads it, which does not know families that bring their own code.
        family = None if any_family else find_family(architecture, str(said.get("model_type")))
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ExportError(f"{path}: {first_line(error)}") from error
    if family is not None:
        check_settings(config, family)
    if getattr(config, "quantization_config", None) is not None:
        raise ExportError(f"{directory}: the backbone is already quantised; export from its unquantised weights")
    return config


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """BLAKE3 over each tensor's name, dtype, shape and bytes, names sorted; 64 hex digits."""
    hasher = blake3()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hasher.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return str(hasher.hexdigest())


def _settle_embedding_scale(model: Any) -> None:
    """Gemma multiplies its embeddings by a number that it rounds to the embeddings' type. Rounded here, it stays the same
    number when the weights are widened."""
    embeddings = model.get_input_embeddings()
    scale = getattr(embeddings, "embed_scale", None)
    if scale is not None:
        embeddings.embed_scale = scale.to(embeddings.weight.dtype).float()


def _finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite, some millions at a time: `isfinite` of a whole embedding takes several
    copies of it."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.detach().reshape(-1).split(1 << 24))


def _geometry(config: PretrainedConfig) -> Geometry:
    c: Any = config
    return Geometry(
        architecture=c.architectures[0],
        model_type=c.model_type,
        hidden_size=c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_kv_heads=getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        head_dim=head_dim(config),
        vocab_size=c.vocab_size,
        context_length=context_length(config),
    )


def _tokens(directory: Path, config: PretrainedConfig) -> Tokens:
    """From config.json; generation_config.json knows better where it says something, as it does when a text
    is generated."""
    found = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    path = directory / "generation_config.json"
    if path.is_file():
        try:
            generation = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ExportError(f"{path}: not JSON ({error})") from error
        found |= {name: generation[name] for name in found if generation.get(name) is not None}
    eos = found["eos_token_id"]
    ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return Tokens(found["bos_token_id"], ends, found["pad_token_id"])
