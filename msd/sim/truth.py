"""What the engines of the simulated contest are: a truth table from published measurements, simulated from there on.

Source: the A100 40 GB matrix of arXiv 2605.23057 (Llama-3.1-8B-Instruct, vLLM 0.6.6, run_20260508), as fitted in the
priors of our modeswitch spec. Per mode, alone on the GPU: TTFT = a0 + a1 * new prompt tokens, TPOT, watts while
decoding, and for two modes the same with four requests at once. What a row below takes from it:

- `prefill_ms_per_token` is a1. a0 (22 to 36 ms) is left out for all modes alike: it holds the client's thread start and
  other time of the host, in which the GPU is free.
- `decode_ms_per_request` is (TPOT of 4 - TPOT of 1) / 3: 0.5 ms for FP16, 0.4 ms for INT8. `step_ms` is the rest.
- INT4 was measured with one request only. Its kernels read a quarter of the weights but unpack them for each row of the
  batch, so that their gain shrinks as the batch grows; existing kernels meet FP16 at a batch of about 16 (Marlin's
  figures, IST-DASLab/marlin; not measured here). So 6.0 + 16 * c = 14.1 + 16 * 0.5 gives c = 1.0 ms.
- Speculation: 34.6 ms a step and 10.3 ms a token make 3.36 tokens a step. In a batch it was not measured either; it
  slows vLLM down 1.4 times at high load (vLLM's own report on speculative decoding). Meeting FP16 at a batch of 8
  (31.3 + 8 * c = 3.36 * 18.1) gives c = 3.3 ms, and 1.4 times its TPOT at 32.
- Energy: `step_mj` and `decode_mj_per_token` from the watts of 1 and of 4 requests, less IDLE_W, times the step; where
  there is no row of 4, the watts of one request times c. `prefill_mj_per_token`: mean over long less short prompts
  (LS-SS, LL-SL, MP-LL) of joules per run over prompt tokens, less idle.
- `int8_pc` is `int8` with prefix caching, which the matrix lacks and vLLM has by default today: without it the
  strongest fixed mode of our time would be missing from the contest.

Quality is a stated gate, taken from the matrix's accuracies (at most 1.5 points below FP16): INT8 fails GPQA (-4), INT4
fails the five suites, FP16 and speculation are lossless. The levels are ranks, not accuracies.
"""

from __future__ import annotations

from random import Random

from msgspec import Struct, structs

from msd.domain import Precision, Speculation

LOSSLESS, EIGHT_BIT, FOUR_BIT = 1.0, 0.9, 0.8
"""Ranks of quality, for `quality` of engines and `quality_floor` of requests."""
IDLE_W = 55.0
"""Of an A100 with nothing to do [claim: 50 to 60 W]."""
KV_BYTES_PER_TOKEN = 131_072
"""32 layers x 8 KV heads x 128 x 2 x FP16."""
OVERHEAD_GB = 2.5
"""Per engine: context, graphs, activations."""
DRIFT = 0.2
"""The truth of a seed is off this table by up to so much, each figure for itself."""
STEP_NOISE = 0.05
MAX_MODEL_LEN = 4_096


class ModeTruth(Struct, frozen=True, kw_only=True):
    """One engine, alone on the GPU; times in ms, energies above idle in mJ."""

    name: str
    precision: Precision
    speculation: Speculation = "none"
    prefix_caching: bool = False
    quality: float
    weights_gb: float
    step_ms: float
    decode_ms_per_request: float
    prefill_ms_per_token: float
    step_mj: float
    decode_mj_per_token: float
    prefill_mj_per_token: float
    tokens_per_step: float = 1.0

    def drifted(self, seed: int) -> ModeTruth:
        """The hidden truth of a seed: the same for every contestant, known to none. A cache changes no kernel."""
        rng = Random(f"{seed}/drift/{self.name.removesuffix('_pc')}")

        def off(value: float) -> float:
            return value * rng.uniform(1.0 - DRIFT, 1.0 + DRIFT)

        return structs.replace(
            self,
            step_ms=off(self.step_ms),
            decode_ms_per_request=off(self.decode_ms_per_request),
            prefill_ms_per_token=off(self.prefill_ms_per_token),
            step_mj=off(self.step_mj),
            decode_mj_per_token=off(self.decode_mj_per_token),
            prefill_mj_per_token=off(self.prefill_mj_per_token),
        )


_INT8 = ModeTruth(
    name="int8",
    precision="int8",
    quality=EIGHT_BIT,
    weights_gb=9.1,
    step_ms=10.4,
    decode_ms_per_request=0.4,
    prefill_ms_per_token=0.0432,
    step_mj=1_255.0,
    decode_mj_per_token=181.0,
    prefill_mj_per_token=18.0,
)

MODES = (
    ModeTruth(
        name="fp16",
        precision="fp16",
        prefix_caching=True,
        quality=LOSSLESS,
        weights_gb=16.1,
        step_ms=14.1,
        decode_ms_per_request=0.5,
        prefill_ms_per_token=0.0634,
        step_mj=2_240.0,
        decode_mj_per_token=257.0,
        prefill_mj_per_token=29.0,
    ),
    _INT8,
    structs.replace(_INT8, name="int8_pc", prefix_caching=True),
    ModeTruth(
        name="int4",
        precision="int4",
        quality=FOUR_BIT,
        weights_gb=5.8,
        step_ms=6.0,
        decode_ms_per_request=1.0,
        prefill_ms_per_token=0.0643,
        step_mj=990.0,
        decode_mj_per_token=165.0,
        prefill_mj_per_token=25.0,
    ),
    ModeTruth(
        name="int4_pc",
        precision="int4",
        prefix_caching=True,
        quality=FOUR_BIT,
        weights_gb=5.8,
        step_ms=6.2,
        decode_ms_per_request=1.0,
        prefill_ms_per_token=0.0672,
        step_mj=905.0,
        decode_mj_per_token=146.0,
        prefill_mj_per_token=26.6,
    ),
    ModeTruth(
        name="spec",
        precision="fp16",
        speculation="draft",
        quality=LOSSLESS,
        weights_gb=18.6,
        step_ms=31.3,
        decode_ms_per_request=3.3,
        prefill_ms_per_token=0.0752,
        step_mj=4_883.0,
        decode_mj_per_token=153.0,
        prefill_mj_per_token=31.0,
        tokens_per_step=3.36,
    ),
)
BY_NAME = {mode.name: mode for mode in MODES}


class Card(Struct, frozen=True, kw_only=True):
    """GPU memory that engines may take."""

    name: str
    usable_gb: float

    def kv_tokens(self, modes: tuple[str, ...]) -> int:
        """Tokens of KV cache that each of these engines gets when all are resident; 0 when they do not fit."""
        left_gb = self.usable_gb - sum(BY_NAME[name].weights_gb + OVERHEAD_GB for name in modes)
        return max(0, int(left_gb / len(modes) * 1e9 / KV_BYTES_PER_TOKEN))


CARDS = {"40": Card(name="40 GB", usable_gb=36.0), "80": Card(name="80 GB", usable_gb=73.0)}
LEAST_KV_TOKENS = 8_192
"""An engine with less could not hold two long requests: its set does not fit."""
