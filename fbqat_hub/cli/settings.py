"""``--set KEY=VALUE``."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Any


def changes_of(pairs: Sequence[str], texts: Collection[str] = ()) -> dict[str, Any]:
    """KEY=VALUE pairs as a mapping; values are read as YAML, 1e-4 is a number, and nothing is an empty text.

    SECTION.KEY=VALUE sets one key of a section.

    Args:
        texts: keys whose values are text, and are taken as they are.

    Raises:
        ValueError: no KEY=VALUE, a key given twice, or a value that is not YAML.

    >>> changes_of(["steps=800", "learning_rate=1e-4", "method=vqat"])
    {'steps': 800, 'learning_rate': 0.0001, 'method': 'vqat'}
    >>> changes_of(["negative_prompt="], texts=["negative_prompt"])
    {'negative_prompt': ''}
    >>> changes_of(["quantization.average_bits=4.5", "quantization.range=static"])
    {'quantization': {'average_bits': 4.5, 'range': 'static'}}
    """
    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r:.80}; what is no setting stands before --set.")
        *sections, last = key.split(".")
        section = changes
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ValueError(f"--set {key}: {name} is set to {section!r:.80} already; give it once.")
        if last in section:
            raise ValueError(f"--set {key} is given twice; give it once.")
        section[last] = value if key in texts else _value(key, value)
    return changes


def _value(key: str, value: str) -> Any:
    import yaml

    from fbqat_hub.untrusted import OtherNumberError, plain_yaml

    try:
        read = plain_yaml(value) if value else ""
    except OtherNumberError as error:
        raise ValueError(f"--set {key}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # a ValueError of a date that is none
        raise ValueError(f"--set {key}: {value!r:.80} is not YAML, such as 5, true or '{{preset: paper}}'.") from None
    if isinstance(read, str) and "e" in read:
        with contextlib.suppress(ValueError):
            return float(read)
    return read
