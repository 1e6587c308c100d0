"""The bench: every Mixture-of-Experts family of transformers, in the forms in which a user meets it."""

from types import MappingProxyType

from .composite import COMPOSITE, WRAPPED
from .family import Family
from .text import BIASED, GROUPED, TOP_K_OF_LOGITS, UNUSUAL

FAMILIES: tuple[Family, ...] = (*TOP_K_OF_LOGITS, *GROUPED, *BIASED, *UNUSUAL, *COMPOSITE, *WRAPPED)
BY_NAME = MappingProxyType({family.name: family for family in FAMILIES})
