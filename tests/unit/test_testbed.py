"""The testbed: its tokenizer, the committed models, the INT8 conversion, and what the accuracy table claims."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from msd.tasks import LEVELS, TASKS, generate
from testbed import tokenizer

TESTBED = Path(__file__).parents[2] / "testbed"
MODELS = TESTBED / "models"
NAMES = ("tiny-small", "tiny-large")
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def saved_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(MODELS / "tiny-large" / "tokenizer.json"))


@pytest.mark.parametrize(
    "text", ["copy abc=abc\ncopy x=", "  two  spaces ", "sort sort =~{}|", "add 75+86=", "copyabc"]
)
def test_tokenizer_round_trip(saved_tokenizer: Any, text: str) -> None:
    ids = saved_tokenizer.encode(text).ids
    assert ids == [tokenizer.BOS_ID, *tokenizer.encode(text)]
    assert saved_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_problem_survives_the_tokenizer_one_token_per_symbol(saved_tokenizer: Any) -> None:
    for task in TASKS:
        for level in LEVELS:
            problem = generate(task, level, 0, num_shots=1)
            assert saved_tokenizer.decode(saved_tokenizer.encode(problem.prompt).ids) == problem.prompt
            assert len(tokenizer.encode(problem.answer)) == len(problem.answer) < problem.max_tokens
            assert tokenizer.UNK_ID not in tokenizer.encode(problem.prompt)


def test_text_outside_ascii_becomes_unknown(saved_tokenizer: Any) -> None:
    assert saved_tokenizer.encode("é").ids == [tokenizer.BOS_ID, tokenizer.UNK_ID]


def test_vocabulary_fits_the_embedding() -> None:
    assert len(tokenizer.VOCABULARY) <= tokenizer.VOCABULARY_SIZE == 128


def test_models_are_small_enough_to_commit() -> None:
    sizes = {name: (MODELS / name / "model.safetensors").stat().st_size for name in NAMES}
    assert sum(sizes.values()) <= 12 * MEGABYTE
    assert sizes["tiny-small"] < sizes["tiny-large"] / 3


@pytest.mark.parametrize("name", NAMES)
def test_configs_agree_with_the_tokenizer_and_the_shape(name: str) -> None:
    pytest.importorskip("torch")
    from testbed.model import SHAPES

    config = json.loads((MODELS / name / "config.json").read_text(encoding="utf-8"))
    assert config == SHAPES[name].to_hf_config()
    assert (MODELS / name / "README.md").read_text(encoding="utf-8").startswith("---\n")
    generation = json.loads((MODELS / name / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.EOS_ID


@pytest.mark.parametrize("name", NAMES)
def test_committed_weights_load_and_count(name: str) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    from testbed.model import SHAPES, Llama

    tensors = safetensors.load_file(MODELS / name / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert 500_000 <= sum(tensor.numel() for tensor in tensors.values()) <= 4_000_000
    Llama(SHAPES[name]).load_state_dict(tensors)


@pytest.mark.parametrize("name", NAMES)
def test_committed_models_answer_the_easy_level(name: str) -> None:
    """The weights belong to this tokenizer and these tasks: eight `copy` problems, all right."""
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    from testbed.model import SHAPES, Llama

    model = Llama(SHAPES[name])
    model.load_state_dict(safetensors.load_file(MODELS / name / "model.safetensors"))
    for seed in range(8):
        problem = generate("copy", 1, seed)
        ids = [tokenizer.BOS_ID, *tokenizer.encode(problem.prompt)]
        said: list[int] = []
        while len(said) < problem.max_tokens:
            tokens = torch.tensor([ids + said])
            time = tokens.shape[1]
            mask = torch.ones(1, 1, time, time, dtype=torch.bool).tril()
            said.append(int(model(tokens, torch.arange(time)[None], mask)[0, -1].argmax()))
            if said[-1] == tokenizer.EOS_ID:
                break
        assert said == [*tokenizer.encode(problem.answer), tokenizer.EOS_ID]


@pytest.mark.slow  # importing transformers' Llama takes seconds
def test_logits_equal_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from testbed.model import SHAPES, Llama

    ours = Llama(SHAPES["tiny-small"])
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SHAPES["tiny-small"].to_hf_config(), "dtype": "float32"})
    )
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.tensor([[tokenizer.BOS_ID, *tokenizer.encode("sort hgfdcba=abcdfgh")]])
    time = tokens.shape[1]
    mask = torch.ones(1, 1, time, time, dtype=torch.bool).tril()
    with torch.inference_mode():
        torch.testing.assert_close(
            ours(tokens, torch.arange(time)[None], mask), theirs(tokens).logits, atol=1e-4, rtol=1e-4
        )


def test_quantize_is_off_by_half_a_scale_at_most() -> None:
    torch = pytest.importorskip("torch")
    from testbed.int8 import dequantize, quantize

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=generator).bfloat16()
    weight[3] = 0
    quantized, scale = quantize(weight)
    assert quantized.dtype is torch.int8
    assert scale.shape == (256, 1)
    assert quantized.min() >= -127
    assert bool(((dequantize(quantized, scale) - weight.float()).abs() <= scale.float() / 2 * (1 + 1e-5)).all())
    assert not dequantize(quantized, scale)[3].any()


@pytest.mark.parametrize("name", NAMES)
def test_int8_variant(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    from testbed.int8 import QUANTIZATION_CONFIG, convert, dequantize, is_quantized

    target = tmp_path / f"{name}-int8"
    assert convert(MODELS / name, target)
    assert not convert(MODELS / name, target), "the second time there is nothing to do"
    assert sorted(tmp_path.iterdir()) == [target]
    source = safetensors.load_file(MODELS / name / "model.safetensors")
    variant = safetensors.load_file(target / "model.safetensors")
    for tensor_name, tensor in source.items():
        if is_quantized(tensor_name):
            scale = variant.pop(tensor_name + "_scale")
            error = (dequantize(variant.pop(tensor_name), scale) - tensor.float()).abs()
            assert bool((error <= scale.float() / 2 * (1 + 1e-5)).all())
        else:
            assert torch.equal(variant.pop(tensor_name), tensor)
    assert not variant
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == QUANTIZATION_CONFIG
    assert (target / "tokenizer.json").read_bytes() == (MODELS / name / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def shares() -> dict[tuple[str, str, str, int, int], float]:
    """Return the committed accuracy: percent by (model, precision, task, level, num_shots)."""
    accuracy = json.loads((TESTBED / "ACCURACY.json").read_text(encoding="utf-8"))
    return {
        (row["model"], row["precision"], row["task"], row["level"], row["num_shots"]): 100 * row["right"] / row["asked"]
        for row in accuracy["rows"]
    }


def test_table_covers_every_model_task_and_level(shares: dict[tuple[str, str, str, int, int], float]) -> None:
    wanted = {
        (name, precision, task, level, num_shots)
        for name in NAMES
        for precision in ("bf16", "int8")
        for task in TASKS
        for level in LEVELS
        for num_shots in (0, 3)
    }
    assert shares.keys() == wanted


def test_large_model_is_right_on_the_easy_levels(shares: dict[tuple[str, str, str, int, int], float]) -> None:
    for task in TASKS:
        assert shares["tiny-large", "bf16", task, 1, 0] >= 95.0, task


def test_large_model_is_clearly_better_on_hard_levels(shares: dict[tuple[str, str, str, int, int], float]) -> None:
    gaps = {
        (task, level): shares["tiny-large", "bf16", task, level, 0] - shares["tiny-small", "bf16", task, level, 0]
        for task in TASKS
        for level in (3, 4)
    }
    assert max(gaps.values()) >= 15.0, gaps


def test_page_is_written_from_the_data() -> None:
    pytest.importorskip("torch")
    from testbed.evaluate import Accuracy, to_markdown

    accuracy = msgspec.json.decode((TESTBED / "ACCURACY.json").read_bytes(), type=Accuracy)
    assert (TESTBED / "ACCURACY.md").read_text(encoding="utf-8") == to_markdown(accuracy)


@pytest.mark.parametrize("name", NAMES)
def test_loss_log_falls_and_ends_at_rate_zero(name: str) -> None:
    lines = (TESTBED / "logs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps))
    assert records[-1]["loss"] < records[0]["loss"] / 10
    assert records[-1]["lr_factor"] < 0.01
