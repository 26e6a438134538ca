"""A GGUF file becomes a BF16 checkpoint with the same values, or nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from fp8ctl import gguf, interpreter, models
from fp8ctl.errors import UnsupportedError
from fp8ctl.render import Reporter

if TYPE_CHECKING:
    from pathlib import Path

# A Llama of one layer with a byte-level vocabulary, as llama.cpp's converter writes it.
_WRITE = """
import sys
import gguf
import numpy as np

random = np.random.default_rng(0)
hidden, width, heads = 32, 64, 2
tokens = ["<s>", "</s>", "<unk>"]
byte = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else None for b in range(256)]
spare = iter(range(256, 512))
tokens += [text or chr(next(spare)) for text in byte]
tokens += ["th", "the"]
w = gguf.GGUFWriter(sys.argv[1], "llama")
w.add_context_length(64)
w.add_embedding_length(hidden)
w.add_block_count(1)
w.add_feed_forward_length(width)
w.add_head_count(heads)
w.add_head_count_kv(heads)
w.add_layer_norm_rms_eps(1e-5)
w.add_rope_freq_base(10000.0)
w.add_rope_dimension_count(hidden // heads)
w.add_vocab_size(len(tokens))
w.add_tokenizer_model("gpt2")
w.add_token_list(tokens)
w.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
w.add_token_merges(["t h", "th e"])
w.add_bos_token_id(0)
w.add_eos_token_id(1)
w.add_unk_token_id(2)
shapes = {
    "token_embd.weight": (len(tokens), hidden),
    "output_norm.weight": (hidden,),
    "blk.0.attn_norm.weight": (hidden,),
    "blk.0.ffn_norm.weight": (hidden,),
    "blk.0.ffn_gate.weight": (width, hidden),
    "blk.0.ffn_up.weight": (width, hidden),
    "blk.0.ffn_down.weight": (hidden, width),
    **{f"blk.0.attn_{p}.weight": (hidden, hidden) for p in ("q", "k", "v", "output")},
}
arrays = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
for name, array in arrays.items():
    w.add_tensor(name, array)
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
np.savez(sys.argv[2], **arrays)
"""

SAME = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
}


def test_without_transformers_it_says_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"reading m\.gguf needs transformers") as caught:
        gguf.convert(tmp_path / "m.gguf", tmp_path / "out", lambda _done, _total: None)
    assert caught.value.exit_code == 4
    assert caught.value.hint == "fp8ctl install sglang"
    assert not (tmp_path / "out").exists()


@pytest.mark.engine
def test_a_converted_model_has_the_values_of_the_file_and_no_copy_of_it(
    tmp_path: Path, engine_python: Path
) -> None:
    source, arrays, out = tmp_path / "tiny.gguf", tmp_path / "arrays.npz", tmp_path / "out"
    subprocess.run([engine_python, "-c", _WRITE, source, arrays], check=True)
    err = io.StringIO()
    report = Reporter(out=io.StringIO(), err=err)
    arguments: dict[str, Any] = {"gguf": str(source), "out": str(out)}
    result = interpreter.run_worker(engine_python, "demo-model", arguments, report, "convert")
    assert "convert: 100 %" in err.getvalue()

    made = load_file(out / "model.safetensors")
    from numpy import load

    wanted = {name: torch.from_numpy(array).bfloat16() for name, array in load(arrays).items()}
    for name, old in SAME.items():
        assert torch.equal(made[name], wanted[old]), name
    # llama.cpp keeps the two halves of a rotary pair side by side.
    for part in ("q", "k"):
        turned = wanted[f"blk.0.attn_{part}.weight"].view(2, 8, 2, 32).swapaxes(1, 2)
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        assert torch.equal(made[name], turned.reshape(32, 32)), name
    assert {t.dtype for t in made.values()} == {torch.bfloat16}
    assert result["parameters"] == sum(t.numel() for t in made.values())

    # What planning reads, and what an engine needs to talk.
    assert models.read_config(out)["model_type"] == "llama"
    assert len(models.read_checkpoint(out).tensors) == len(made)
    assert "the" in json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert (out / "tokenizer_config.json").exists()
    copies = [path for path in out.iterdir() if path.read_bytes()[:4] == b"GGUF"]
    assert copies == []
