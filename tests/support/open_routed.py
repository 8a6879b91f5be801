"""What a user does with a routed export: a program of its own, on a machine without this package or DeepSpeed.

    python open_routed.py WANTED.json FOUND.pt

WANTED maps a name to `directory`, `prompts` (pair -> token ids), and `save`, where to save the model again (or null).
FOUND gets logits, translations and the messages of wrong calls by name.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.modules["lander_ds"] = None  # type: ignore[assignment]
sys.modules["deepspeed"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(1)


def error_of(call: Any, *args: Any, **kwargs: Any) -> str | None:
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


wanted, target = map(Path, sys.argv[1:])
actual: dict[str, Any] = {}
for name, case in json.loads(wanted.read_text()).items():
    model = AutoModelForCausalLM.from_pretrained(
        case["directory"], trust_remote_code=True, dtype=torch.float32
    )
    assert not model.training
    pairs, prompts = list(case["prompts"]), [torch.tensor([ids]) for ids in case["prompts"].values()]
    longest = max(prompt.shape[1] for prompt in prompts)
    # A batch of several pairs, padded on the left as generation needs it.
    rows = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(p), (longest - p.shape[1], 0)) for p in prompts]
    )
    # "none" comes last.
    pair_ids = torch.tensor([*range(len(pairs) - 1), -1])
    greedy = {"max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        actual[name] = {
            "logits": {pair: model(p, pair=pair).logits for pair, p in zip(pairs, prompts, strict=True)},
            "greedy": {
                pair: model.generate(p, attention_mask=torch.ones_like(p), pair=pair, **greedy)
                for pair, p in zip(pairs, prompts, strict=True)
            },
            "beams": {
                pair: model.generate(p, attention_mask=torch.ones_like(p), pair=pair, num_beams=3, **greedy)
                for pair, p in zip(pairs, prompts, strict=True)
            },
            "mixed": model.generate(rows, attention_mask=mask, pair_ids=pair_ids, **greedy)[:, longest:],
            "mixed_beams": model.generate(
                rows, attention_mask=mask, pair_ids=pair_ids, num_beams=3, **greedy
            )[:, longest:],
            "no_pair": error_of(model, prompts[0]),
            "no_pair_generate": error_of(model.generate, prompts[0], **greedy),
            "unknown_pair": error_of(model, prompts[0], pair="en-xx"),
        }
    actual[name]["dtypes"] = sorted({str(p.dtype) for p in model.parameters()})
    actual[name]["limit"] = model.generation_config.max_new_tokens
    actual[name]["parameters"] = sum(p.numel() for p in model.parameters())
    actual[name]["config"] = type(
        AutoConfig.from_pretrained(case["directory"], trust_remote_code=True)
    ).__name__
    if case.get("save"):
        model.save_pretrained(case["save"])
        again = AutoModelForCausalLM.from_pretrained(case["save"], trust_remote_code=True)
        with torch.no_grad():
            actual[name]["resaved"] = again(prompts[0], pair=pairs[0]).logits
assert not any(
    module.split(".")[0] in ("lander_ds", "deepspeed") and sys.modules[module] for module in sys.modules
)
torch.save(actual, target)
