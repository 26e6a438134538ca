"""What safetensors and torch call a dtype. Torch and the standard library; Python 3.10."""

from __future__ import annotations

import torch

#: By safetensors' name.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
#: The same by torch's name, without the `torch.`: as dtypes are called on the wire.
SPELLED = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
