"""Which licence a model may state, given the licences of the models that it was made from.

One licence for all parents is inherited. Of several permissive ones the strictest is stated. Any other mixture is
a person's decision, and a parent without a licence leaves the answer unknown. This compares names; it is not
legal advice.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

# In the order of how much they ask of those who pass the work on, the least first.
PERMISSIVE = (
    "cc0-1.0",
    "unlicense",
    "wtfpl",
    "zlib",
    "mit",
    "isc",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "bsd-3-clause-clear",
    "apache-2.0",
    "cc-by-2.0",
    "cc-by-2.5",
    "cc-by-3.0",
    "cc-by-4.0",
)


class Terms(NamedTuple):
    """A licence as the metadata of a Hub card state it."""

    id: str
    name: str | None = None  # `license_name` and `license_link`, which go with the id "other"
    link: str | None = None

    def __str__(self) -> str:
        return self.name if self.id == "other" and self.name else self.id


class Verdict(NamedTuple):
    """What a model made from the parents may state, and why."""

    terms: Terms | None  # None: unknown
    reason: str
    needs_consent: bool = False  # nobody should publish this without having read the licences


def stated_terms(metadata: Mapping[str, Any]) -> Terms | None:
    """The licence in a card's metadata; None if there is none."""
    stated = metadata.get("license")
    if isinstance(stated, list):
        stated = stated[0] if len(stated) == 1 else None
    if not isinstance(stated, str) or stated == "unknown":
        return None
    return Terms(stated.lower(), metadata.get("license_name"), metadata.get("license_link"))


def resolve(
    parents: Mapping[str, Terms | None],  # the parent's name -> its licence
) -> Verdict:
    """The licence that a model made from these parents may state."""
    known = {terms for terms in parents.values() if terms is not None}
    unknown = [name for name, terms in parents.items() if terms is None]
    if unknown or not known:
        restricted = any(terms.id not in PERMISSIVE for terms in known)
        return Verdict(None, _unknown_reason(unknown), needs_consent=restricted)
    if len(known) == 1:
        (terms,) = known
        whose = "every model that it was made from" if len(parents) > 1 else next(iter(parents))
        return Verdict(terms, f"the licence of {whose}")
    listed = " and ".join(sorted(map(str, known)))
    if all(terms.id in PERMISSIVE for terms in known):
        strictest = max(known, key=lambda terms: PERMISSIVE.index(terms.id))
        return Verdict(strictest, f"the strictest of {listed}, which are permissive")
    mixture = Terms("other", "-and-".join(sorted(map(str, known))))
    return Verdict(mixture, f"the parents are under {listed}, and all of these apply", needs_consent=True)


def _unknown_reason(parents: list[str]) -> str:
    if not parents:
        return "no parent is known"
    return f"no licence is stated for {', '.join(parents)}"
