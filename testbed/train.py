"""Train the testbed's models from a seed: `python -m testbed.train --all --seed 0`.

One step sees `ROWS` rows of `ROW_TOKENS` tokens. A row is packed with documents; a document is one question, or a few
of the same task and level one after another (the few-shot form of msd.tasks), and attention stays inside it. The loss
is on the answers and on the end of sequence after each, whatever follows in the document.

Matrices learn with Muon, the rest with AdamW. The learning rate warms up, stays, and falls to zero over the last part
(`--decay`). The levels open one after another, and (task, level) cells that are still wrong are drawn more often.
"""

import argparse
import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from msd.tasks import LEVELS, SHOT_SEPARATOR, TASKS, sample
from testbed.export import export
from testbed.model import SHAPES, Llama
from testbed.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCABULARY, encode

ROWS: Final = 24
ROW_TOKENS: Final = 160
MAX_SHOTS: Final = 3
IGNORED: Final = -100
CELLS: Final = tuple((task, level) for task in TASKS for level in LEVELS)
SEPARATOR_ID: Final = VOCABULARY[SHOT_SEPARATOR]


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided about the training of one model."""

    steps: int
    matrix_lr: float = 3e-3
    other_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_share: float = 0.3
    """Part of all steps over which the learning rate falls to zero."""
    embedding_std: float = 0.02
    """Scale of the embedding at the start. Large enough to outlast the first layers, lookups are learned sooner."""
    mastery: float = 0.0
    """A level stays nearly closed until the level below it is answered this well."""


RECIPES: Final = {
    "tiny-small": Recipe(steps=600, embedding_std=0.5, mastery=0.6),
    "tiny-large": Recipe(steps=4676),
}


class Curriculum:
    """Which (task, level) to draw next: levels open over the first steps, wrong cells weigh more."""

    def __init__(self, mastery: float) -> None:
        self.mastery = mastery
        self.accuracy = [0.0] * len(CELLS)

    def weights(self, step: int) -> list[float]:
        """Return one weight per cell."""
        weights = []
        for cell, ((_, level), accuracy) in enumerate(zip(CELLS, self.accuracy, strict=True)):
            opened = min(1.0, max(0.04, step / 300 - (level - 1) + 1.0))
            if level > 1 and self.accuracy[cell - 1] < self.mastery:
                opened = 0.04
            weights.append(opened * (0.15 + min(1.0, 2.0 * (1.0 - accuracy))))
        return weights

    def learn(self, right: list[int], asked: list[int]) -> None:
        """Fold one step's exact answers into the running accuracy."""
        for cell, num_asked in enumerate(asked):
            if num_asked:
                keep = 0.98 ** min(num_asked, 20)
                self.accuracy[cell] = keep * self.accuracy[cell] + (1 - keep) * right[cell] / num_asked


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Packed rows. `documents` is -1 on padding; `answers` numbers the answers of the batch at labelled places."""

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    labels: Tensor
    answers: Tensor
    answer_cells: Tensor


def document(cell: int, rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    """Return tokens, labels and, per labelled place, the number of the answer within the document (else -1)."""
    num_questions = 1 if rng.random() < 0.7 else rng.randint(2, MAX_SHOTS + 1)
    tokens, labels, answers = [BOS_ID], [IGNORED], [-1]
    for index in range(num_questions):
        question, answer = (encode(text) for text in sample(*CELLS[cell], rng))
        if index:
            tokens.append(SEPARATOR_ID)
            labels.append(IGNORED)
            answers.append(-1)
        tokens += question + answer
        labels += [IGNORED] * (len(question) - 1) + answer + [EOS_ID]
        answers += [-1] * (len(question) - 1) + [index] * (len(answer) + 1)
    return tokens, labels, answers


def pack(weights: list[float], rng: random.Random, num_rows: int = ROWS) -> Batch:
    """Draw documents until every row is full; a document that does not fit its row starts the next one."""
    tokens = torch.full((num_rows, ROW_TOKENS), PAD_ID)
    positions = torch.zeros((num_rows, ROW_TOKENS), dtype=torch.long)
    documents = torch.full((num_rows, ROW_TOKENS), -1)
    labels = torch.full((num_rows, ROW_TOKENS), IGNORED)
    answers = torch.full((num_rows, ROW_TOKENS), -1)
    answer_cells: list[int] = []
    row = start = num_documents = 0
    while True:
        cell = rng.choices(range(len(CELLS)), weights)[0]
        new_tokens, new_labels, new_answers = document(cell, rng)
        if start + len(new_tokens) > ROW_TOKENS:
            row, start = row + 1, 0
            if row == num_rows:
                break
        span = slice(start, start + len(new_tokens))
        tokens[row, span] = torch.tensor(new_tokens)
        positions[row, span] = torch.arange(len(new_tokens))
        documents[row, span] = num_documents
        labels[row, span] = torch.tensor(new_labels)
        first_answer = len(answer_cells)
        answers[row, span] = torch.tensor([-1 if answer < 0 else first_answer + answer for answer in new_answers])
        answer_cells += [cell] * (max(new_answers) + 1)
        start = span.stop
        num_documents += 1
    return Batch(
        tokens=tokens,
        positions=positions,
        documents=documents,
        labels=labels,
        answers=answers,
        answer_cells=torch.tensor(answer_cells),
    )


def learning_rate(step: int, recipe: Recipe, last_step: int) -> float:
    """Return the factor on both learning rates: warm-up, plateau, linear fall to zero at `last_step`."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    fall = min(1.0, (last_step - step) / max(1.0, recipe.decay_share * last_step))
    return warm * max(0.0, fall)


def optimizers(model: Llama, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    muon = torch.optim.Muon(
        matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adamw]


def step_loss(model: Llama, batch: Batch) -> tuple[Tensor, list[int], list[int]]:
    """Return the mean loss over labelled places, and per cell how many answers were right throughout and were asked."""
    causal = torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()
    mask = (batch.documents[:, None, :, None] == batch.documents[:, None, None, :]) & causal
    at = (batch.labels.flatten() != IGNORED).nonzero().squeeze(-1)
    torch._dynamo.mark_dynamic(at, 0)
    labels = batch.labels.flatten()[at]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch.tokens, batch.positions, mask, at)
    logits = logits.float()
    loss = F.cross_entropy(logits, labels)
    wrong = torch.zeros(len(batch.answer_cells), dtype=torch.long)
    wrong.index_add_(0, batch.answers.flatten()[at], (logits.detach().argmax(-1) != labels).long())
    asked = torch.bincount(batch.answer_cells, minlength=len(CELLS))
    right = torch.bincount(batch.answer_cells[wrong == 0], minlength=len(CELLS))
    return loss, right.tolist(), asked.tolist()


def train(name: str, recipe: Recipe, seed: int, minutes: float | None, checkpoint_minutes: float) -> None:
    """Train one model, print and log its progress, and save it in the form that vLLM loads.

    Stops after `recipe.steps`. With `minutes`, or on SIGUSR1, the fall of the learning rate starts early enough to end
    in time; the last line of the log says how many steps it came to, which `--steps` repeats.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"{name}/{seed}")
    model = Llama(SHAPES[name], recipe.embedding_std)
    model.forward = torch.compile(model.forward)  # type: ignore[method-assign]  # 0.4 s a step instead of 0.7 s
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: training {num_parameters:,} parameters for {recipe.steps} steps, seed {seed}", flush=True)
    optimizing = optimizers(model, recipe)
    curriculum = Curriculum(recipe.mastery)
    finish_early = [False]
    signal.signal(signal.SIGUSR1, lambda *_: finish_early.__setitem__(0, True))
    last_step, is_falling = recipe.steps, False
    loss_sum, right_sum, asked_sum = 0.0, [0] * len(CELLS), [0] * len(CELLS)
    began_s = saved_s = time.monotonic()
    with (log_path(name)).open("w", encoding="utf-8") as log:
        step = 0
        while step < last_step:
            spent_s = time.monotonic() - began_s
            if not is_falling and step > recipe.warmup_steps:
                is_late = minutes is not None and spent_s >= minutes * 60 * (1 - recipe.decay_share)
                is_planned = step >= last_step * (1 - recipe.decay_share)
                if is_late or finish_early[0]:
                    last_step = min(last_step, round(step / (1 - recipe.decay_share)))
                    print(f"{name}: learning rate falls from step {step}, the end is step {last_step}", flush=True)
                is_falling = is_late or finish_early[0] or is_planned
            loss, right, asked = step_loss(model, pack(curriculum.weights(step), rng))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            factor = learning_rate(step, recipe, last_step)
            for optimizer in optimizing:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                optimizer.step()
                optimizer.zero_grad()
            curriculum.learn(right, asked)
            loss_sum += loss.item()
            right_sum = [a + b for a, b in zip(right_sum, right, strict=True)]
            asked_sum = [a + b for a, b in zip(asked_sum, asked, strict=True)]
            step += 1
            if step % 50 == 0 or step == last_step:
                num_steps = step % 50 or 50
                exact = {
                    f"{task}/{level}": round(r / a, 3)
                    for (task, level), r, a in zip(CELLS, right_sum, asked_sum, strict=True)
                    if a
                }
                record = {
                    "step": step,
                    "loss": round(loss_sum / num_steps, 4),
                    "lr_factor": round(factor, 4),
                    "elapsed_s": round(time.monotonic() - began_s, 1),
                    "exact": exact,
                }
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(progress(name, record, last_step), flush=True)
                loss_sum, right_sum, asked_sum = 0.0, [0] * len(CELLS), [0] * len(CELLS)
            if time.monotonic() - saved_s > checkpoint_minutes * 60:
                export(model)
                saved_s = time.monotonic()
    export(model)
    print(f"{name}: done, {last_step} steps in {time.monotonic() - began_s:.0f} s", flush=True)


def log_path(name: str) -> Path:
    """Return where the loss log of a model lies."""
    folder = Path(__file__).parent / "logs"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}.jsonl"


def progress(name: str, record: dict[str, object], last_step: int) -> str:
    """Return one line: step, loss, and exact answers in percent per task, levels 1 to 4."""
    exact = record["exact"]
    assert isinstance(exact, dict)

    def levels() -> Iterator[str]:
        for task in TASKS:
            shown = (exact.get(f"{task}/{level}") for level in LEVELS)
            yield task + " " + "/".join("-" if share is None else str(round(100 * share)) for share in shown)

    return f"{name} {record['step']}/{last_step} {record['elapsed_s']} s loss {record['loss']} | " + ", ".join(levels())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the testbed's tiny models from a seed.")
    parser.add_argument("names", nargs="*", choices=[*SHAPES, []], help="models to train")
    parser.add_argument("--all", action="store_true", help="train every model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's number of steps")
    parser.add_argument("--minutes", type=float, help="end after about this long, if the steps are not done by then")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0, help="save the weights this often")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = list(SHAPES) if arguments.all else arguments.names
    if not names:
        parser.error("name a model, or say --all")
    for name in names:
        recipe = RECIPES[name]
        if arguments.steps:
            recipe = msgspec.structs.replace(recipe, steps=arguments.steps)
        train(name, recipe, arguments.seed, arguments.minutes, arguments.checkpoint_minutes)


if __name__ == "__main__":
    main()
