"""ImageReward in a Python of its own: pairs as JSON on standard input, scores as the last line of standard output.

Run by `fbqat_hub.evaluation.learned.image_rewards`; imports nothing of this package.
"""

import json
import sys
from typing import Any


def main() -> dict[str, Any]:
    """``{"scores": [...]}``, or ``{"error", "at"}`` with where it failed: "import", "load" or "score"."""
    pairs = json.load(sys.stdin)
    at = "import"
    try:
        import ImageReward
        import torch

        at = "load"
        model = ImageReward.load("ImageReward-v1.0", device=sys.argv[1])
        at = "score"
        with torch.no_grad():
            return {"scores": [float(model.score(prompt, file)) for prompt, file in pairs]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "at": at}


if __name__ == "__main__":
    answer = main()
    print(json.dumps(answer))
