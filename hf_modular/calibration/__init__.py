"""What merge methods need to know of models on data: sizes of activations, and how much to rescale."""

from hf_modular.calibration._activations import activation_norms
from hf_modular.calibration._dare import DAREScale, dare_q

__all__ = ["DAREScale", "activation_norms", "dare_q"]
