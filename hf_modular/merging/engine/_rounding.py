"""From the arithmetic's dtype to the result's, rounded once."""

import numpy as np
import torch
from torch import Tensor

_LAST = 0xFFF  # the last bits of fp32, which are 0 in whatever lies in the middle of two numbers of 16 bits


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:  # (*shape)
    """The nearest numbers of a dtype, of two equally near ones the even.

    From fp64 to 16 bits torch goes by way of fp32, where what is just beside the middle of two neighbours may become
    the middle. So what may be such a middle is cut instead, and its last bit set, which says that there is more
    (rounding to odd: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE TC 57, 2008).
    """
    if x.dtype != torch.float64 or dtype.itemsize != 2:
        return x.to(dtype)
    exact = x.reshape(-1).numpy(force=True)
    with np.errstate(over="ignore"):  # what becomes infinite is refused later, by name
        single = exact.astype(np.float32)
    bits = single.view(np.int32)
    chosen = np.flatnonzero(bits & _LAST == 0)
    wide, near = exact[chosen], bits[chosen]
    back = near.view(np.float32).astype(np.float64)
    near -= np.abs(back) > np.abs(wide)  # towards 0
    near |= back != wide
    bits[chosen] = near
    return torch.from_numpy(single).to(dtype).view(x.shape)
