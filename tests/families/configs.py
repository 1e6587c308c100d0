"""The test bench: every Mixture-of-Experts family of transformers, in its usual forms."""

from pathlib import Path
from types import MappingProxyType

import transformers

from .composite import COMPOSITE, WRAPPED
from .family import Family
from .text import BIASED, GROUPED, TOP_K_OF_LOGITS, UNUSUAL

_MODELS = Path(transformers.__file__).parent / "models"
_KNOWN = (*TOP_K_OF_LOGITS, *GROUPED, *BIASED, *UNUSUAL, *COMPOSITE, *WRAPPED)
# Some of them came with a later release than the installed one.
_INSTALLED = tuple(family for family in _KNOWN if (_MODELS / family.folder).is_dir())
BROKEN = tuple(family for family in _INSTALLED if transformers.__version__ in family.broken_in)
FAMILIES: tuple[Family, ...] = tuple(family for family in _INSTALLED if family not in BROKEN)
BY_NAME = MappingProxyType({family.name: family for family in FAMILIES})
