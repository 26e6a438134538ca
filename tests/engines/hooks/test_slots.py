"""A tensor of a bucket is a view of it."""

from __future__ import annotations

import torch

from fp8ctl import wire
from fp8ctl.engines.hooks.slots import view


def test_a_tensor_is_a_view_of_its_bucket() -> None:
    bucket = torch.arange(2048, dtype=torch.int64).to(torch.uint8)
    entry = wire.Entry("a", "bfloat16", (3, 4), 512)
    found = view(bucket, entry)
    assert (found.dtype, tuple(found.shape)) == (torch.bfloat16, (3, 4))
    assert found.data_ptr() == bucket.data_ptr() + 512
    codes = view(bucket, wire.Entry("a", "float8_e4m3fn", (2, 5), 256))
    assert torch.equal(codes.view(torch.uint8).flatten(), bucket[256:266])
    assert view(bucket, wire.Entry("a", "float32", (), 0)).shape == ()
    assert view(bucket, wire.Entry("a", "float32", (0, 4), 0)).shape == (0, 4)
