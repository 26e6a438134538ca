"""Bytes on one GPU against figures that were worked out by hand from the models' sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fp8ctl.formats import BlockSize, Mode
from fp8ctl.manifest import Memory
from fp8ctl.models import read_checkpoint
from fp8ctl.planning import plan_checkpoint
from tests.public_models import LAYOUTS, Layout, dense, save

if TYPE_CHECKING:
    from pathlib import Path


def memory(folder: Path, layout: Layout, tp: int, mode: Mode = Mode.BLOCK) -> Memory:
    checkpoint = read_checkpoint(save(folder / "model", layout))
    block = BlockSize(128, 128) if mode is Mode.BLOCK else None
    return plan_checkpoint(checkpoint, "sglang", mode, tp, block).memory


# Linears of a layer: 2 * 4096^2 + 2 * 1024 * 4096 + 3 * 14336 * 4096 = 218 103 808; of 32 layers
# 6 979 321 856; their scales a 4096th of that in bytes. Embedding and head: 2 * 128256 * 4096 =
# 1 050 673 152. Norms: 65 * 4096 = 266 240. KV: 32 layers * 2 * 8 heads * 128 * 2 bytes.
@pytest.mark.parametrize(
    ("tp", "expected"),
    [
        (1, Memory(16_060_522_496, 6_979_321_856 + 1_703_936 + 2_101_878_784, 131_072)),
        (2, Memory(8_030_527_488, 3_489_660_928 + 851_968 + 1_050_673_152 + 532_480, 65_536)),
    ],
)
def test_llama_8b(tp: int, expected: Memory, tmp_path: Path) -> None:
    assert memory(tmp_path, LAYOUTS["Llama-3.1-8B"](), tp) == expected


def test_a_scale_for_each_tensor_takes_four_bytes(tmp_path: Path) -> None:
    found = memory(tmp_path, LAYOUTS["Llama-3.1-8B"](), 1, Mode.PER_TENSOR)
    assert found.after == 6_979_321_856 + 4 * 7 * 32 + 2_101_878_784


def test_key_value_heads_are_whole_where_ranks_are_more(tmp_path: Path) -> None:
    # 8 heads on 16 GPUs: each has one, 128 rows of k and of v.
    assert memory(tmp_path, LAYOUTS["Llama-3.1-8B"](), 16).cache_per_token == 32 * 2 * 128 * 2


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """Qwen3-30B-A3B on two GPUs.

    Linears: 48 * (18 874 368 of attention + 128 * 3 * 768 * 2048) = 29 896 998 912. Embedding and
    head 622 329 856. Whole on both: routers 48 * 128 * 2048 and norms 210 944.
    """
    found = memory(tmp_path, LAYOUTS["Qwen3-30B-A3B"](), 2)
    whole = 2 * (48 * 128 * 2048 + 210_944)
    assert found.before == 29_896_998_912 + 622_329_856 + whole
    assert found.after == 14_948_499_456 + 3_649_536 + 622_329_856 + whole
    assert found.cache_per_token == 48 * 2 * 2 * 128 * 2


def test_latent_attention_is_cached_once_and_held_twice(tmp_path: Path) -> None:
    found = memory(tmp_path, LAYOUTS["DeepSeek-V2-Lite"](), 1)
    assert found.cache_per_token == 27 * 576 * 2
    # kv_b_proj, 16 * 256 rows of 512, is there a second time in 16 bits.
    assert found.before == 2 * (15_706_484_224 + 27 * 16 * 256 * 512)


def test_layers_that_predict_ahead_are_not_loaded(tmp_path: Path) -> None:
    plain = dense("llama", 256, 512, 2, (2, 2, 128), 640)
    more = {
        name.replace("layers.1.", "layers.2."): shape
        for name, shape in plain.shapes.items()
        if "layers.1." in name
    }
    more["mtp.fc.weight"] = (256, 512)
    ahead = Layout(plain.config, {**plain.shapes, **more})
    assert memory(tmp_path / "a", ahead, 1) == memory(tmp_path / "b", plain, 1)


def test_the_vocabulary_is_padded_to_whole_parts_of_64_rows(tmp_path: Path) -> None:
    # 700 rows are padded to 704: 352 on each of two GPUs.
    odd = memory(tmp_path / "a", dense("llama", 256, 512, 1, (2, 2, 128), 700), 2)
    even = memory(tmp_path / "b", dense("llama", 256, 512, 1, (2, 2, 128), 704), 2)
    assert odd == even
