"""Model cards: what a folder holds and where it came from, said honestly."""

from hf_modular.cards._card import Card, Facts, make_card, save_card

__all__ = ["Card", "Facts", "make_card", "save_card"]
