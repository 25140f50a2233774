"""Train the LoRA of samples/zoos/one-checkpoint.toml: what the bundled medium model lacks, long texts.

``python -m tools.bundled_zoo.lora [--out DIR]`` on one core of a CPU, half a minute; needs PEFT. Steps and seeds are
fixed, and the numbers of its card are computed here.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from tools.bundled_zoo.train import ROOT, ZOO, Recipe, evaluate, fit, new_tokenizer

BASE = "medium"
OUT = ROOT / "samples" / "zoos" / "lora-long"
RANK = 8
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# of the base: width, layers, heads; of the LoRA: steps, batch, rate, how often it sees each level
RECIPE = Recipe("lora-long", 40, 3, 2, 80, steps=400, batch=64, rate=5e-3, weights=(1, 1, 2, 3, 3))

CARD = """\
---
license: apache-2.0
language: [en, de]
library_name: peft
---
# A LoRA of messcli's bundled medium model

**A demonstration, like its base.** The medium model was trained on short texts; this adapter, of rank {rank} on all
its linear layers ({numbers:,} numbers), was trained on long ones: {steps} steps of AdamW on {batch} generated sentences
each, levels 1 to 5 drawn {weights}, seed {seed}, one CPU thread. `python -m tools.bundled_zoo.lora` repeats it.
Apache-2.0, like messcli.

| held-out texts | number | base: exact, BLEU-1 | with the adapter |
|---|---:|---:|---:|
{rows}
"""


def main(arguments: list[str]) -> int:
    """Train, save, score and describe it."""
    parser = argparse.ArgumentParser(prog="python -m tools.bundled_zoo.lora", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the adapter (%(default)s)")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="for a trial (%(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(RECIPE.seed)
    model = LlamaForCausalLM.from_pretrained(ZOO / BASE, local_files_only=True)
    before = evaluate(model.eval(), new_tokenizer())
    adapted = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LAYERS))
    )  # in place
    recipe = Recipe(**{**vars(RECIPE), "steps": options.steps})
    after = evaluate(fit(model, recipe), new_tokenizer())
    adapted.save_pretrained(options.out)
    settings = options.out / "adapter_config.json"
    found = json.loads(settings.read_text(encoding="utf-8"))
    found |= {"base_model_name_or_path": f"messcli's bundled {BASE} model", "target_modules": sorted(LAYERS)}
    settings.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
    (options.out / "adapter_model.safetensors").chmod(0o644)
    rows = "\n".join(
        f"| {name} | {now.texts} | {was.exact:.3f}, {was.bleu1:.3f} | {now.exact:.3f}, {now.bleu1:.3f} |"
        for (name, now), was in zip(after.items(), before.values(), strict=True)
    )
    card = CARD.format(
        rank=RANK,
        numbers=sum(one.numel() for name, one in model.named_parameters() if "lora_" in name),
        steps=recipe.steps,
        batch=recipe.batch,
        weights=" : ".join(map(str, recipe.weights)),
        seed=recipe.seed,
        rows=rows,
    )
    (options.out / "README.md").write_text(card, encoding="utf-8", newline="\n")
    sys.stdout.write(card)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
