"""Check what `make demo` left: every step, the held-out gain, and a model that loads."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# The README's seeds gain 29 points and more; less than this, and something is wrong.
LEAST_GAIN = 0.15


def main(run: Path) -> None:
    """Raise SystemExit with what is missing."""
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    if steps != list(range(1, 61)):
        raise SystemExit(f"check_demo: metrics.jsonl holds steps {steps}, expected 1 to 60")
    held_out = [json.loads(line)["eval/reward"] for line in (run / "eval.jsonl").open()]
    if held_out[-1] - held_out[0] < LEAST_GAIN:
        raise SystemExit(f"check_demo: held-out {held_out}, expected a gain of {LEAST_GAIN}")
    tokenizer = AutoTokenizer.from_pretrained(run / "export", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        run / "export", dtype=torch.float32, trust_remote_code=False
    )
    start = AutoModelForCausalLM.from_pretrained(
        "recipes/demo/model", dtype=torch.float32, trust_remote_code=False
    )
    before = dict(start.named_parameters())
    same = [name for name, tensor in model.named_parameters() if torch.equal(tensor, before[name])]
    if same:
        raise SystemExit(f"check_demo: training left {same} as they were")
    ids = tokenizer("1 + 2 = ", return_tensors="pt").input_ids
    if model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= ids.shape[1]:
        raise SystemExit("check_demo: the exported model generates nothing")
    print(
        f"check_demo: held-out {held_out[0]:.3f} -> {held_out[-1]:.3f}, export loads and generates"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
