"""Fisher information of models over data: which parameters matter, and how much."""

from hf_modular.fisher._information import fisher_information

__all__ = ["fisher_information"]
