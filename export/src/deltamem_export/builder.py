"""Runs the model builder of onnxruntime-genai on a loaded backbone, and works around what it gets wrong for
families we support. It writes an ONNX decoder without a memory; whether that decoder is right is for
`check.py` to say.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime_genai.models

from deltamem_export.backbone import Backbone
from deltamem_export.errors import ExportError
from deltamem_export.precision import Precision

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"


def build(backbone: Backbone, directory: Path, precision: Precision) -> Path:
    """Writes `model.onnx` and `model.onnx.data` into an existing directory and returns the path of the first.

    Raises:
        ExportError: the builder fails on this backbone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # The builder has a graph per execution provider. Its fp16 graph for a CPU has no GroupQueryAttention; the
    # one for CUDA has, and with q and k norms left as nodes of their own it runs on both.
    provider = "cuda" if precision.name == "fp16" else "cpu"
    options: dict[str, Any] = {"windowed_kv_cache": False, "fuse_qk_norm_gqa": False}
    if precision.name == "int4":
        options |= {"block_size": precision.block_size, "accuracy_level": precision.accuracy_level}
    said = io.StringIO()
    try:
        with _builder_modules() as main, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            model_class = _cured(getattr(main, _CLASSES[backbone.geometry.architecture]))
            io_dtype = main.set_io_dtype(precision.name, provider, options)
            onnx_dtype = main.set_onnx_dtype(precision.name, options)
            config = copy.deepcopy(backbone.config)
            config._name_or_path = str(backbone.directory)
            made = model_class(config, io_dtype, onnx_dtype, provider, str(directory / "cache"), options)
            made.load_weights = lambda _path: backbone.model
            made.make_model(str(backbone.directory))
            made.save_model(str(directory))
    except Exception as error:
        last = said.getvalue().strip().splitlines()[-1:] or ["nothing"]
        raise ExportError(
            f"{backbone.directory}: onnxruntime-genai's builder failed with {type(error).__name__}: {error} "
            f"(it last said: {last[0]})"
        ) from error
    return directory / MODEL_FILE


_CLASSES = {"LlamaForCausalLM": "LlamaModel", "Qwen3ForCausalLM": "Qwen3Model", "SmolLM3ForCausalLM": "SmolLM3Model"}


def _cured(model_class: type[Any]) -> type[Any]:
    """SmolLM3: on a layer without RoPE the builder turns off fused RoPE and then asks for position ids that
    the graph does not have. Saying that the layer has no RoPE at all is what it needs."""
    if model_class.__name__ != "SmolLM3Model":
        return model_class

    class SmolLM3(model_class):  # type: ignore[misc]
        def make_attention(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
            rope = self.attention_attrs["rope"]
            self.attention_attrs["rope"] = bool(self.no_rope_layers[layer_id])
            try:
                super().make_attention(layer_id, attention, root_input, **kwargs)
            finally:
                self.attention_attrs["rope"] = rope

    return SmolLM3


@contextlib.contextmanager
def _builder_modules() -> Iterator[ModuleType]:
    """The builder is a script whose modules import each other as top-level names, so its folder has to be on
    the path while it runs."""
    folder = str(Path(onnxruntime_genai.models.__file__ or "").parent)
    logger = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    level = logger.level
    logger.setLevel(logging.WARNING)  # it says a line for every node
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("builder")
    finally:
        sys.path.remove(folder)
        logger.setLevel(level)
