"""Runs the model builder of onnxruntime-genai on a loaded backbone, with what it gets wrong put right
(`corrections.py`). It writes an ONNX decoder without a memory; whether that decoder is right is for
`check.py` to say.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime_genai.models

from deltamem_export.backbone import Backbone
from deltamem_export.corrections import corrected, prepare_config, untouched
from deltamem_export.errors import ExportError
from deltamem_export.families import FAMILIES, builder_class
from deltamem_export.precision import Precision
from deltamem_export.streaming import save_streaming, streamed

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"


def build(
    backbone: Backbone,
    directory: Path,
    precision: Precision,
    say: Callable[[str], None] = lambda _: None,
    correct: bool = True,
) -> Path:
    """Writes `model.onnx` and `model.onnx.data` into a directory and returns the path of the first.

    Args:
        backbone: the decoder.
        directory: made if it is not there.
        precision: of the weights and the arithmetic; the KV cache is left in the activations' type.
        say: gets a line for every eighth of the layers.
        correct: False: as the builder alone makes it, for a look at what it gets wrong.

    Raises:
        ExportError: the builder fails on this backbone.
        OSError: the files cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # The builder has a graph per execution provider. Its fp16 graph for a CPU has no GroupQueryAttention; the
    # one for CUDA has, and with q and k norms left as nodes of their own it runs on both.
    provider = "cpu" if precision.arithmetic == "fp32" else "cuda"
    # Experts stay as the activations are: the builder has 4 bits for them only from files that already have 4.
    options: dict[str, Any] = {
        "windowed_kv_cache": False,
        "fuse_qk_norm_gqa": False,
        "moe_quant_type": "none",
        **_quantisation(precision),
    }
    said = io.StringIO()
    try:
        with _builder_modules() as main, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            family = FAMILIES[backbone.geometry.architecture]
            own_choice = builder_class(backbone.config, family)
            model_class = streamed(
                corrected(getattr(main, family.builder), family) if correct else getattr(main, own_choice)
            )
            io_dtype = main.set_io_dtype(precision.name, provider, options)
            onnx_dtype = main.set_onnx_dtype(precision.name, options)
            config = copy.deepcopy(backbone.config)
            config._name_or_path = str(backbone.directory)
            if correct:
                prepare_config(config, family)
            made = model_class(config, io_dtype, onnx_dtype, provider, str(directory / "cache"), options)
            made.load_weights = lambda _path: backbone.model
            with untouched(backbone.model):
                made.make_model(str(backbone.directory))
            made.stamp_build_metadata(made.model)
    except Exception as error:
        last = said.getvalue().strip().splitlines()[-1:] or ["nothing"]
        raise ExportError(
            f"{backbone.directory}: onnxruntime-genai's builder failed with {type(error).__name__}: {error} "
            f"(it last said: {last[0]})"
        ) from error
    save_streaming(made, backbone.model, directory / MODEL_FILE, say)
    return directory / MODEL_FILE


def _quantisation(precision: Precision) -> dict[str, Any]:
    """The builder's options for weights in blocks."""
    if not precision.quantised:
        return {}
    return {
        "block_size": precision.block_size,
        "accuracy_level": precision.accuracy_level,
        "is_symmetric": precision.symmetric,
        "algo_config": precision.algorithm,
        "op_types_to_quantize": ("MatMul", "Gather") if precision.embeddings else ("MatMul",),
    }


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
