"""How tensors are merged: in pieces, by several workers, checked beforehand."""
