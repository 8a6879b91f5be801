"""The systems that the step benchmark compares; each function is the whole work of one rank process.

`lander` is this package's own session and training loop. The others are transformers' Trainer as its users run it:
model from `from_pretrained`, DeepSpeed JSON in `TrainingArguments`, its dataloader, loss and optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from turns import Turns, Work
from workload import Workload

from lander_ds.data.batching.packing import Example

REPLICATED_JSON = Path(__file__).parents[1] / "ds_configs" / "270m" / "replicated.json"
LORA_RANK = 16
SPECIFIC_SHARE = 0.1
"""Of a layer's neurons, for all pairs together: 90 % are general (the default of `select.banks.rho`)."""

IGNORED = -100
"""Label of a token without loss."""


def lander(
    workload: Workload,
    directory: Path,
    turns: Turns,
    *,
    replicated: bool = False,
    cached: bool = False,
    gated: bool = True,
) -> None:
    """This trainer: routed FFNs in the chosen layers, one bank per pair.

    Args:
        workload: what is trained.
        directory: for the run.
        turns: to take.
        replicated: topology `replicated`, with the DeepSpeed JSON that goes with it; otherwise `zero3`.
        cached: hidden states below the trained layers are computed before the first step and kept.
        gated: with gates.
    """
    from lander_ds.common.run_directory import RunDirectory
    from lander_ds.distributed import collectives, process_group
    from lander_ds.distributed.start import Start
    from lander_ds.training.metrics_logger import MetricsLogger
    from lander_ds.training.prefix_cache import open_prefixes
    from lander_ds.training.session import open_session
    from lander_ds.training.trainer import Trainer

    class TurnMetrics(MetricsLogger):
        """Takes the next turn where the real one writes figures down."""

        first_loss = 0.0

        def __init__(self) -> None:
            pass

        def step(self, record: dict[str, Any]) -> None:
            self.first_loss = self.first_loss or record["loss"]
            turns.next()

    process_group.start()
    recipe = recipe_of(workload, directory)
    if replicated:
        recipe = replace(recipe, topology="replicated", deepspeed=str(REPLICATED_JSON))
    if not gated:
        recipe = replace(recipe, routing=replace(recipe.routing, gate="none"))
    run = RunDirectory(recipe.run_dir)
    if process_group.rank() == 0:
        _save_selection(workload, recipe, run)
    collectives.barrier()
    if cached:
        recipe = replace(recipe, train=replace(recipe.train, prefix_cache="disk"))
    start, data, metrics = Start(recipe, run), workload.data(), TurnMetrics()
    session = open_session(start)
    prefixes = open_prefixes(start, session, data, beat=lambda doing: None)
    trainer = Trainer(session, data, metrics, save=lambda progress, measured: None, prefixes=prefixes)
    turns.next()
    trainer.run()
    turns.finish(session.trained_parameters, session.total_parameters, metrics.first_loss)
    process_group.stop()


def recipe_of(workload: Workload, directory: Path) -> Any:
    """A recipe that trains the workload."""
    from lander_ds.config.recipe import ModelConfig, Recipe
    from lander_ds.config.schema.data import DataConfig
    from lander_ds.config.schema.training import LearningRates, TrainConfig

    rate = workload.learning_rate
    return Recipe(
        run_dir=str(directory / "run"),
        model=ModelConfig(workload.model, dtype=workload.dtype),  # type: ignore[arg-type]
        data=DataConfig(workload.pairs, ()),
        deepspeed=workload.deepspeed,
        seed=workload.seed,
        train=TrainConfig(
            steps=workload.steps,
            batch_tokens=workload.tokens_per_step,
            pack_tokens=workload.tokens,
            lr=LearningRates(general=rate, specific=rate, gates=rate),
            schedule="constant",
        ),
    )


def _save_selection(workload: Workload, recipe: Any, run: Any) -> None:
    """Banks drawn at random: their sizes decide what a step costs, not which neurons they hold."""
    import torch

    from lander_ds.method.selection import Bank, LayerSelection, Selection
    from lander_ds.models.loading import build
    from lander_ds.models.weights import base_fingerprint

    model, family = build(recipe.model)
    neurons = family.neurons(model)
    pairs = workload.pairs
    size = max(1, round(SPECIFIC_SHARE * neurons / len(pairs)))
    banks = (
        Bank("general", pairs, neurons - size * len(pairs)),
        *(Bank("specific", (pair,), size) for pair in pairs),
    )
    generator = torch.Generator().manual_seed(workload.seed)
    layers = tuple(
        LayerSelection(layer, torch.randperm(neurons, generator=generator), banks)
        for layer in workload.layers
    )
    metadata = {"base_fingerprint": base_fingerprint(workload.model)}
    Selection(pairs, neurons, layers, metadata).save(run.selection)


def hugging_face(
    workload: Workload, directory: Path, turns: Turns, *, lora: bool, target_logits: bool
) -> None:
    """transformers' Trainer with DeepSpeed.

    Args:
        workload, directory, turns: as of every system.
        lora: train adapters on all linear layers but the head, through PEFT, instead of everything.
        target_logits: ask the model for logits at the positions that predict a target token; otherwise at all
            positions, as the model does when nothing is said.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from lander_ds.distributed import process_group

    class TurnCallback(TrainerCallback):  # type: ignore[misc]
        """Takes turns; a step lasts until the next one begins, so fetching its batch is part of it."""

        first_loss = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.next()

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            self.first_loss = self.first_loss or logs.get("loss", 0.0)

    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        deepspeed=workload.deepspeed,
        use_cpu=True,
        bf16=workload.dtype == "bfloat16",
        max_steps=workload.steps,
        per_device_train_batch_size=workload.examples,
        train_sampling_strategy="sequential",
        learning_rate=workload.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=workload.steps + 1,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=workload.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=getattr(torch, workload.dtype))
    if lora:
        from peft import LoraConfig, get_peft_model

        options = LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, options)
    callback = TurnCallback()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=workload.in_order(),
        data_collator=partial(_collate, target_logits=target_logits),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    turns.next()
    sizes = [(parameter.ds_numel, parameter.requires_grad) for parameter in trainer.model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    turns.finish(trained, sum(size for size, _ in sizes), callback.first_loss)
    process_group.stop()


def _collate(examples: list[Example], target_logits: bool) -> dict[str, Any]:
    """A batch [B, longest], padded on the right; prompts and padding carry no loss.

    `logits_to_keep` and `shift_labels` are how transformers' models are told to compute some logits only; that needs
    examples of one length.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.from_numpy(example.input_ids).long() for example in examples]
    input_ids = pad_sequence(rows, batch_first=True)
    labels = torch.full_like(input_ids, IGNORED)
    mask = torch.zeros_like(input_ids)
    for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
        labels[number, example.prompt_length : len(row)] = row[example.prompt_length :]
        mask[number, : len(row)] = 1
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    if target_logits:
        prompt = examples[0].prompt_length
        batch["logits_to_keep"] = torch.arange(prompt - 1, input_ids.shape[1] - 1)
        batch["shift_labels"] = labels[:, prompt:].contiguous()
    return batch


System = Callable[[Workload, Path, Turns], None]
OTHER_TRAINERS: dict[str, System] = {
    "full": partial(hugging_face, lora=False, target_logits=False),
    "lora": partial(hugging_face, lora=True, target_logits=False),
    "full_same_logits": partial(hugging_face, lora=False, target_logits=True),
    "lora_same_logits": partial(hugging_face, lora=True, target_logits=True),
}
SYSTEMS: dict[str, System] = {
    "lander": lander,
    "ungated": partial(lander, gated=False),
    "replicated": partial(lander, replicated=True),
    "cached": partial(lander, cached=True),
    "replicated_cached": partial(lander, replicated=True, cached=True),
    **OTHER_TRAINERS,
}


def work(system: str, workload: Workload, directory: Path) -> Work:
    """What a rank process of `system` does; picklable."""
    return partial(SYSTEMS[system], workload, directory)
