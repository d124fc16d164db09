"""Gradient-free search over a merge's coefficients and settings, by what the merged models are worth."""

from hf_modular.searching._report import SearchReport
from hf_modular.searching._search import search
from hf_modular.searching._trials import Trial
from hf_modular.searching._validation import Command, Validation

__all__ = ["Command", "SearchReport", "Trial", "Validation", "search"]
