"""Adapters from disk: official and ours, and one error that names what is wrong with the others."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamem_export.adapter import (
    CONFIG_FILE,
    OFFICIAL_FILE,
    SAFETENSORS_FILE,
    Adapter,
    AdapterConfig,
    AttentionShape,
    convert,
)
from deltamem_export.errors import AdapterError

FITS = AttentionShape(hidden=64, q=64, k=32, v=32, o=64)
KEY = "model.layers.1.self_attn."


@pytest.fixture
def official(parity_data: Path, tmp_path: Path) -> Path:
    """A copy of an official adapter that a test may spoil."""
    return Path(shutil.copytree(parity_data / "qwen3_tsw_qo" / "adapter", tmp_path / "adapter"))


def settings_of(directory: Path) -> dict[str, object]:
    return json.loads((directory / CONFIG_FILE).read_text())


def change(directory: Path, **settings: object) -> None:
    (directory / CONFIG_FILE).write_text(json.dumps(settings_of(directory) | settings))


def change_tensors(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Names are those of layer 1; None removes one."""
    state = torch.load(directory / OFFICIAL_FILE, weights_only=True)
    for name, tensor in tensors.items():
        if tensor is None:
            del state[KEY + name]
        else:
            state[KEY + name] = tensor
    torch.save(state, directory / OFFICIAL_FILE)


def refused(directory: Path, *words: str) -> str:
    with pytest.raises(AdapterError) as error:
        Adapter.load(directory).check_backbone([FITS] * 3)
    message = str(error.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


def test_an_official_adapter_loads_as_it_is(official: Path) -> None:
    adapter = Adapter.load(official)
    assert adapter.config.rank == 8
    assert adapter.config.scaling == 2.0
    assert adapter.config.delta_heads == ("q", "o")
    assert adapter.hidden_size == 64
    assert adapter.check_backbone([FITS] * 3) == (0, 1, 2)


def test_an_adapter_saved_by_us_is_the_same_adapter(official: Path, tmp_path: Path) -> None:
    before = Adapter.load(official)
    before.save(tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [SAFETENSORS_FILE, CONFIG_FILE]
    after = Adapter.load(tmp_path / "ours")
    assert after.config == before.config
    for (key, tensor), (same, other) in zip(before.tensors(), after.tensors(), strict=True):
        assert key == same
        assert torch.equal(tensor, other)


def test_half_precision_tensors_come_back_as_float32(official: Path) -> None:
    state = torch.load(official / OFFICIAL_FILE, weights_only=True)
    torch.save({key: tensor.bfloat16() for key, tensor in state.items()}, official / OFFICIAL_FILE)
    assert {tensor.dtype for _, tensor in Adapter.load(official).tensors()} == {torch.float32}


def test_corrections_that_are_not_in_use_may_be_absent(official: Path) -> None:
    change_tensors(official, delta_k_proj=None, delta_v_proj=None)
    Adapter.load(official).check_backbone([FITS] * 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_memory_partitions", 2),
        ("num_global_memory_partitions", 1),
        ("memory_reader_layers", [1]),
        ("latent_memory_layers", [0]),
        ("memory_readout_mode", "projected_kv_slots"),
        ("memory_write_source", "synthetic"),
        ("memory_write_proposals_per_message", 3),
        ("synthetic_memory_slots", 4),
        ("global_memory_mode", "read_only"),
        ("global_memory_merge_mode", "add"),
        ("global_memory_read_top_k", 1),
        ("slot_read_top_k", 1),
        ("target_modules", ["mlp"]),
        ("delta_scale_parameterization", "free"),
    ],
)
def test_an_archived_setting_is_refused_by_name_unless_neutral(official: Path, name: str, value: object) -> None:
    change(official, **{name: value})
    refused(official, name, repr(value))


def test_an_unknown_setting_is_refused_by_name(official: Path) -> None:
    change(official, memory_of_elephants=True)
    refused(official, "memory_of_elephants")


@pytest.mark.parametrize(
    "name", ["rank", "alpha", "couple_lambda", "rankwise_gates", "delta_heads", "state_update_mode"]
)
def test_a_missing_setting_is_named(official: Path, name: str) -> None:
    settings = settings_of(official)
    del settings[name]
    (official / CONFIG_FILE).write_text(json.dumps(settings))
    refused(official, name, "missing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("rank", 129),
        ("rank", 8.0),
        ("rank", True),
        ("alpha", "16"),
        ("num_state_heads", 0),
        ("num_state_heads", 257),
        ("normalize_qk", 1),
        ("state_update_mode", "lambda_inside"),
        ("memory_write_granularity", "paragraph"),
        ("delta_heads", []),
        ("delta_heads", ["q", "q"]),
        ("delta_heads", ["x"]),
        ("delta_heads", [["q"]]),
        ("target_layers", [-1]),
        ("target_layers", [0, 0]),
        ("target_layers", "most"),
        ("target_layers", ["0"]),
        ("delta_scale_granularity", "tensor"),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_was_found(official: Path, name: str, value: object) -> None:
    change(official, **{name: value})
    refused(official, name, repr(value), "expected")


@pytest.mark.parametrize("value", [[], "off", None])
def test_no_target_layers_means_all(official: Path, value: object) -> None:
    change(official, target_layers=value)
    assert Adapter.load(official).check_backbone([FITS] * 3) == (0, 1, 2)


def test_a_target_layer_that_the_backbone_does_not_have_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"target_layers is \[1, 9\], expected .* 0 to 2"):
        AdapterConfig(rank=8, alpha=8.0, target_layers=(9, 1)).memory_layers(3)


def test_a_missing_key_is_named_with_its_shape(official: Path) -> None:
    change_tensors(official, beta_bias=None)
    refused(official, KEY + "beta_bias", "missing", "[8]")


def test_a_missing_correction_is_named(official: Path) -> None:
    change_tensors(official, delta_q_proj=None)
    refused(official, KEY + "delta_q_proj", "missing")


def test_an_extra_key_is_named(official: Path) -> None:
    change_tensors(official, lambda_bias=torch.zeros(8))
    refused(official, KEY + "lambda_bias", "[8]")


def test_a_key_of_another_module_is_named(official: Path) -> None:
    state = torch.load(official / OFFICIAL_FILE, weights_only=True)
    torch.save(state | {"model.layers.0.mlp.up_proj": torch.zeros(2)}, official / OFFICIAL_FILE)
    refused(official, "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("name", "shape", "want"),
    [
        ("memory_k_proj", (8, 32), "[8, 64]"),
        ("beta_proj", (1, 64), "[8, 64]"),
        ("beta_bias", (8, 1), "[8]"),
        ("delta_q_proj", (64, 4), "[64, 8]"),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    official: Path, name: str, shape: tuple[int, ...], want: str
) -> None:
    change_tensors(official, **{name: torch.zeros(shape)})
    refused(official, KEY + name, str(list(shape)), want)


def test_gates_per_head_want_one_gate_for_each_head(official: Path) -> None:
    change(official, rankwise_gates=False)
    refused(official, "beta_proj", "[8, 64]", "[1, 64]")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_named_with_their_place(official: Path, bad: float) -> None:
    tensor = torch.zeros(8, 64)
    tensor[3, 5] = bad
    change_tensors(official, memory_v_proj=tensor)
    refused(official, KEY + "memory_v_proj", str(bad), "[3, 5]")


def test_a_backbone_of_another_width_is_refused(official: Path) -> None:
    wide = AttentionShape(hidden=128, q=128, k=32, v=32, o=128)
    with pytest.raises(AdapterError, match=re.escape("memory_q_proj has shape [8, 64], expected [8, 128]")):
        Adapter.load(official).check_backbone([wide] * 3)


def test_a_backbone_of_another_depth_is_refused(official: Path) -> None:
    with pytest.raises(AdapterError, match="the backbone has 4 layers"):
        Adapter.load(official).check_backbone([FITS] * 4)


def test_a_pickle_with_code_is_refused_and_not_run(official: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (mark,))

    (official / OFFICIAL_FILE).write_bytes(pickle.dumps({"x": Evil()}, protocol=2))
    refused(official, OFFICIAL_FILE)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"PK\x03\x04 neither"])
def test_a_broken_official_file_is_one_clear_error(official: Path, content: bytes) -> None:
    (official / OFFICIAL_FILE).write_bytes(content)
    refused(official, OFFICIAL_FILE)


def test_a_truncated_safetensors_file_is_one_clear_error(official: Path) -> None:
    Adapter.load(official).save(official)
    path = official / SAFETENSORS_FILE
    path.write_bytes(path.read_bytes()[:-7])
    refused(official, SAFETENSORS_FILE)


def test_tensors_that_are_not_numbers_are_refused(official: Path) -> None:
    Adapter.load(official).save(official)
    tensors = load_file(official / SAFETENSORS_FILE)
    save_file(tensors | {KEY + "beta_bias": torch.zeros(8, dtype=torch.int64)}, official / SAFETENSORS_FILE)
    refused(official, KEY + "beta_bias", "int64")


def test_a_config_that_is_not_json_is_one_clear_error(official: Path) -> None:
    (official / CONFIG_FILE).write_text("{rank: 8}")
    refused(official, CONFIG_FILE, "JSON")


@pytest.mark.parametrize("name", [CONFIG_FILE, OFFICIAL_FILE])
def test_a_missing_file_is_named(official: Path, name: str) -> None:
    (official / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        Adapter.load(official)


# ---------------------------------------------------------------------- from one form to the other


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    return {
        key: (t.dtype, list(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()) for key, t in tensors.items()
    }


def official_tensors(directory: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(directory / OFFICIAL_FILE, weights_only=True)
    assert type(loaded) is dict
    assert {type(tensor) for tensor in loaded.values()} == {torch.Tensor}
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_official_to_ours_and_back_keeps_every_bit(official: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in torch.load(official / OFFICIAL_FILE, weights_only=True).items()}
    state[KEY + "beta_bias"][:2] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 4], dtype=dtype)
    torch.save(state, official / OFFICIAL_FILE)
    settings = (official / CONFIG_FILE).read_bytes()

    ours, count = convert(official, tmp_path / "ours")
    assert (ours.name, count) == (SAFETENSORS_FILE, 27)
    back, _ = convert(tmp_path / "ours", tmp_path / "back")
    assert back.name == OFFICIAL_FILE
    assert bits(load_file(ours)) == bits(official_tensors(tmp_path / "back")) == bits(state)
    assert (tmp_path / "ours" / CONFIG_FILE).read_bytes() == (tmp_path / "back" / CONFIG_FILE).read_bytes() == settings


def test_ours_to_official_and_back_keeps_every_bit(official: Path, tmp_path: Path) -> None:
    Adapter.load(official).save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "official")
    convert(tmp_path / "official", tmp_path / "back")
    before, after = (load_file(tmp_path / name / SAFETENSORS_FILE) for name in ("ours", "back"))
    assert bits(before) == bits(after)


def test_settings_without_effect_survive(official: Path, tmp_path: Path) -> None:
    """They say how the adapter was trained, and the official code wants to see them again."""
    change(official, beta_bias_init=-2.5, latent_gate_init=0.5)
    convert(official, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert settings_of(tmp_path / "back") == settings_of(official)
    assert settings_of(tmp_path / "back")["beta_bias_init"] == -2.5


def test_both_forms_may_lie_in_one_folder_and_then_one_must_be_asked_for(official: Path, tmp_path: Path) -> None:
    before = bits(official_tensors(official))
    convert(official, official)
    assert bits(load_file(official / SAFETENSORS_FILE)) == before
    with pytest.raises(AdapterError, match="--to"):
        convert(official, tmp_path / "out")
    written, _ = convert(official, tmp_path / "out", to="official")
    assert written.name == OFFICIAL_FILE
    assert bits(official_tensors(tmp_path / "out")) == before


def test_convert_refuses_what_is_unsound_or_in_the_way(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "ours")
    with pytest.raises(AdapterError, match="exists already"):
        convert(official, tmp_path / "ours")
    with pytest.raises(AdapterError, match="exists already"):
        convert(official, tmp_path / "ours", to="official")
    change_tensors(official, beta_bias=torch.full((8,), float("nan")))
    with pytest.raises(AdapterError, match="beta_bias holds nan"):
        convert(official, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    with pytest.raises(FileNotFoundError, match="no such adapter"):
        convert(tmp_path / "nowhere", tmp_path / "damaged")
