"""The rule stands three times: readable in PyTorch, grafted in ONNX, plain in Rust. Here all three run the same tokens side by side,
and are held against each other and against the official code's goldens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import deltamem_rt as dm
from agreement import assert_close
from deltamem_export.adapter import Adapter
from deltamem_export.reference import attach

LOGITS, STATES = 1e-4, 1e-5


@pytest.mark.parametrize("case", ["qwen3_tsw_qo", "smollm3_tsw_qo"])
def test_pytorch_onnx_and_rust_agree(case: str, parity_data: Path, parity_bundle) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(
        parity_data / case / "backbone", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    handle = attach(backbone, Adapter.load(parity_data / case / "adapter"))
    handle.record = True
    handle.reset()
    with np.load(parity_data / case / "golden.npz") as arrays:
        golden = dict(arrays)
    model = dm.Model.load(parity_bundle(case))
    rust = np.zeros(model.geometry.shape, np.float32)

    with model.session() as session, torch.no_grad():
        for t in range(5):
            ids = golden[f"turn{t}_ids"]
            onnx_logits = session.feed(ids, logits=True)
            session.end_turn()
            torch_logits = backbone(torch.from_numpy(ids)[None].long(), use_cache=False).logits[0].numpy()
            for index, layer in enumerate(handle.layer_indices):
                said = handle.recorded[layer]
                arrays = [getattr(said, name)[0].numpy() for name in ("q", "k", "v", "keep", "erase", "write")]
                _, rust[index] = dm.scan(*arrays, rust[index])

            onnx, pytorch = session.memory, handle.state[0].numpy()
            expected = golden[f"turn{t}_states"].reshape(onnx.shape)
            states = {"PyTorch": pytorch, "ONNX": onnx, "Rust": rust, "official": expected}
            for name, state in states.items():
                for other, twin in states.items():
                    assert_close(f"turn {t}, states of {name} against {other}", state, twin, STATES)
            for name, logits in {"PyTorch": torch_logits, "ONNX": onnx_logits}.items():
                assert_close(f"turn {t}, logits of {name}", logits, golden[f"turn{t}_logits"], LOGITS)
