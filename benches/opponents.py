"""Those who generate in the benches, all asked the same: read a prompt, give the first token, give `tokens` more, greedily. Each turn's
figures are `prefill`, seconds from the prompt to the first token, and `decode`, seconds a token after it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import deltamem_rt as dm
from deltamem_export.adapter import Adapter
from deltamem_export.reference import Scan, attach, scan
from deltamem_export.scan import chunked_scan
from measuring import Figures, seconds


class Engine:
    """deltamem-rt, through the iterator that its users have."""

    def __init__(self, model: dm.Model) -> None:
        self.model = model

    def __call__(self, prompt: np.ndarray, tokens: int) -> Figures:
        with self.model.session() as session:
            reply = session.generate(prompt, max_new_tokens=tokens + 2)
            began = time.perf_counter()
            next(reply)
            first = time.perf_counter()
            for _ in range(tokens):
                next(reply)
            ended = time.perf_counter()
            reply.close()
        return {"prefill": first - began, "decode": (ended - first) / tokens}


class GenAI:
    """onnxruntime-genai's own generator with its own settings, or with these many threads. Making a generator is not counted."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        config = genai.Config(str(path))
        if threads is not None:
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = genai.Model(config)

    def __call__(self, prompt: np.ndarray, tokens: int) -> Figures:
        settings = genai.GeneratorParams(self._model)
        settings.set_search_options(max_length=len(prompt) + tokens + 2, do_sample=False)
        generator = genai.Generator(self._model, settings)
        began = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        ended = time.perf_counter()
        if generator.is_done():
            raise RuntimeError("onnxruntime-genai's reply ended by chance; take another prompt")
        return {"prefill": first - began, "decode": (ended - first) / tokens}


def fastest_scan(rank: int, tokens: int = 128) -> Scan:
    """Of PyTorch's two scans the one that takes less for a prompt of these many tokens here, and the plain one for single tokens."""
    row = torch.rand(1, tokens, 1, rank)
    arguments = (row, row, row, row, row, row, torch.zeros(1, 1, rank, rank))
    with torch.inference_mode():
        for one in (scan, chunked_scan):
            one(*arguments)
        times = {one: min(seconds(lambda one=one: one(*arguments)) for _ in range(5)) for one in (scan, chunked_scan)}
    prompts = min(times, key=lambda one: times[one])

    def fastest(q: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (scan if q.shape[1] == 1 else prompts)(q, *others)

    return fastest


class Torch:
    """Hugging Face and PyTorch with the reference memory of deltamem_export, prompts by the one of its scans that is
    faster here, tokens by the plain one.

    `precision`: fp32, bf16, fp16, or int8 (PyTorch's dynamic quantisation of the linear layers).
    """

    def __init__(self, backbone: Path, adapter: Path, precision: str, device: str = "cpu") -> None:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        self._model = AutoModelForCausalLM.from_pretrained(backbone, dtype=dtype).eval().to(device)
        memory = Adapter.load(adapter)
        self._memory = attach(self._model, memory, scan=fastest_scan(memory.config.rank)).to(device)
        if precision == "int8":
            from torch.ao.quantization import quantize_dynamic

            quantize_dynamic(self._model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)

    @torch.inference_mode()
    def __call__(self, prompt: np.ndarray, tokens: int) -> Figures:
        self._memory.reset()
        cache = DynamicCache()
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(self._model.device)

        def step(ids: torch.Tensor) -> torch.Tensor:
            logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1].argmax(-1, keepdim=True)

        began = time.perf_counter()
        ids = step(ids)
        int(ids)
        first = time.perf_counter()
        for _ in range(tokens):
            ids = step(ids)
            int(ids)
        return {"prefill": first - began, "decode": (time.perf_counter() - first) / tokens}
