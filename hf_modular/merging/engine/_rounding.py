"""From the arithmetic's dtype to the result's, rounded once."""

import numpy as np
import torch
from torch import Tensor

# The last bits of fp32, and what they are in the middle of two neighbours; for fp16, whose small numbers have fewer
# bits, the last ones that all middles share.
_MIDDLES = {torch.bfloat16: (0xFFFF, 0x8000), torch.float16: (0xFFF, 0)}


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:  # (*shape)
    """The nearest numbers of a dtype, of two equally near ones the even.

    From fp64 to 16 bits torch goes by way of fp32, where what is just beside the middle of two neighbours may become
    the middle. So what may be such a middle is cut instead, and its last bit set, which says that there is more
    (rounding to odd: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE TC 57, 2008).
    """
    if x.dtype != torch.float64 or dtype not in _MIDDLES:
        return x.to(dtype)
    exact = x.reshape(-1).numpy(force=True)
    with np.errstate(over="ignore"):  # what becomes infinite is refused later, by name
        single = exact.astype(np.float32)
    bits = single.view(np.int32)
    last, middle = _MIDDLES[dtype]
    chosen = np.flatnonzero(bits & last == middle)
    chosen = chosen[exact[chosen] != single[chosen]]  # most are the middle itself
    bits[chosen] -= np.abs(single[chosen]) > np.abs(exact[chosen])  # towards 0
    bits[chosen] |= 1
    return torch.from_numpy(single).to(dtype).view(x.shape)
