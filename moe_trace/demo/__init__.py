"""A small OLMoE with real routing.

It was trained on four domains; its experts prefer domains, and its load is uneven. Everything is in this
folder, so nothing is downloaded. `MODEL_CARD.md` describes its training data, quality and routing;
`scripts/train_demo_model.py` recreates it. Importing this module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import ByT5Tokenizer, OlmoeForCausalLM

__all__ = ["DEMO_PROMPTS", "demo_path", "load_demo_model"]

# Written for this package in the style of each domain. The JSON shares its keys with the training text and
# nothing else.
DEMO_PROMPTS: dict[str, str] = {
    "prose": (
        "And it came to pass in the evening of the third day, that the old man rose up from his place by "
        "the fire, and said unto his sons, Behold, the river is high, and the bridge is broken; who shall "
        "go over and bring again the cattle of your brother? And they answered him, and said, We are tired, "
        "and the night is dark. Then was the old man sorrowful, and he took his staff, and went down alone "
        "unto the water.\n"
        "HAMMER, n.  A tool with which a man of peace may persuade a nail of the error of its ways, and "
        "strike his own thumb in the heat of the argument.\n"
    ),
    "code": (
        "class RetryQueue:\n"
        '    """A queue that gives failed items back until their attempts are used up."""\n\n'
        "    def __init__(self, limit=3):\n"
        "        self.limit = limit\n"
        "        self._items = []\n\n"
        "    def push(self, item, attempts=0):\n"
        "        if attempts >= self.limit:\n"
        '            raise ValueError("too many attempts: %r" % item)\n'
        "        self._items.append((item, attempts))\n\n"
        "    def pop(self):\n"
        "        try:\n"
        "            return self._items.pop(0)\n"
        "        except IndexError:\n"
        "            return None\n"
    ),
    "json": (
        "[\n  {\n"
        '    "code": "U+F8D0",\n    "name": "DEMO CAPITAL LETTER A WITH TRACE",\n    "category": "Lu",\n'
        '    "bidirectional": "L",\n    "decomposition": "0041 0301",\n    "numeric": null,\n'
        '    "mirrored": false,\n    "entity": null\n  },\n  {\n'
        '    "code": "U+F8D1",\n    "name": "DEMO SMALL LETTER A WITH TRACE",\n    "category": "Ll",\n'
        '    "bidirectional": "L",\n    "decomposition": "0061 0301",\n    "numeric": null,\n'
        '    "mirrored": false,\n    "entity": "&demo;"\n  }\n]'
    ),
    "html": (
        '<h2 id="reading_a_trace"><span>2.1. </span>RouterOutput A Trace</h2>\n\n'
        '<p>The <a href="router.html">router</a> selects one or more experts for each row of the table.\n'
        "If the <b>limit</b> parameter is omitted, then all of the rows are returned.\n"
        "<ul>\n<li><p> The first argument is the name of the file.\n"
        '<li><p> The second argument is a <a href="counter.html#step">step counter</a> or NULL.\n</ul>\n\n'
        '<div class="codeblock"><pre>SELECT layer, sum(load) FROM trace GROUP BY layer;\n</pre></div>\n'
    ),
}
"""Mapping from domain to a prompt of 450 to 560 bytes that the model has not seen. Each byte is a token."""


def demo_path() -> Path:
    """Return the folder for `OlmoeForCausalLM.from_pretrained`, with config, weights and model card."""
    return Path(__file__).parent


def load_demo_model(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None, **kwargs: Any
) -> tuple[OlmoeForCausalLM, ByT5Tokenizer]:
    """Load the model, in eval mode, and its tokenizer from this package alone.

    `dtype=None` means float32: the weights are stored in bfloat16, which is slow on many CPUs. `kwargs` are
    passed to `from_pretrained` (for example `experts_implementation="eager"`). The tokenizer has no
    vocabulary file: each byte is a token with the id byte + 3. It appends the end token 1, so encode a prompt
    that is to be continued with `add_special_tokens=False`.
    """
    import torch
    from transformers import ByT5Tokenizer, OlmoeForCausalLM

    kwargs.setdefault("local_files_only", True)
    model = OlmoeForCausalLM.from_pretrained(demo_path(), dtype=dtype or torch.float32, **kwargs)
    return model.to(device).eval(), ByT5Tokenizer()
