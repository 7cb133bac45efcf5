"""Reads a spec from TOML: a file, or a preset that ships with loadgen.

A spec that cannot be used raises `SpecError` with *every* problem at once, each with its line, dotted field, value,
what is allowed and, for an unknown word, the nearest valid one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

from loadgen.decoding import Problem, Rules, convert, locate
from loadgen.spec import (
    ArrivalSpec,
    ClassSpec,
    ContentSpec,
    Fixed,
    GroupsPrefix,
    Length,
    Lognormal,
    OnOff,
    ShotsPrefix,
    Spec,
    Square,
    TaskMix,
    Uniform,
)
from msd import tasks

MAX_PLANNED_REQUESTS = 50_000_000
SHARE_TOLERANCE = 1e-6
MAX_P95_OVER_MEAN = 3.86
"""exp(1.645^2 / 2): the widest that a lognormal's p95 can be from its mean."""
PRESETS = Path(__file__).parent / "presets"


class SpecError(ValueError):
    """The spec cannot be used; carries every problem. Recoverable by the user: mend the file."""

    def __init__(self, origin: str, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(f"{origin}:{problem}" for problem in problems))
        self.problems = problems


def parse(text: str, origin: str, overrides: dict[str, object] | None = None) -> Spec:
    """Read a spec from TOML. `overrides` maps dotted fields of two words (`plan.seed`) to values. Raises SpecError."""
    try:
        document: dict[str, object] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(origin, (Problem(path="", message=f"not TOML: {error}"),)) from error
    for dotted, value in (overrides or {}).items():
        section, _, field = dotted.partition(".")
        table = document.setdefault(section, {})
        if isinstance(table, dict):
            table[field] = value
    problems: list[Problem] = list(_check_shares(document.get("class")))
    spec = convert(Spec, document, RULES, problems)
    if spec is None:
        raise SpecError(origin, tuple(locate(text, problem) for problem in problems))
    return spec


def load(name: str, overrides: dict[str, object] | None = None) -> Spec:
    """Read a spec from a file, or the preset of that name. Raises SpecError."""
    path = Path(name)
    if not path.is_file():
        path = PRESETS / f"{name}.toml"
        if not path.is_file():
            message = f"no such file, and no preset of that name (presets: {', '.join(presets())})"
            raise SpecError(name, (Problem(path="", message=message),))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(name, (Problem(path="", message=f"cannot be read: {error}"),)) from error
    return parse(text, name, overrides)


def presets() -> list[str]:
    """Names of the specs that ship with loadgen."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


# --- rules that span fields ------------------------------------------------------------------------------------------


def _check_shares(classes: object) -> Iterator[Problem]:
    """Look at the document itself, so that one unknown field elsewhere does not hide this."""
    if not isinstance(classes, list):
        return
    shares = [traffic.get("share") for traffic in classes if isinstance(traffic, dict)]
    numbers = [share for share in shares if isinstance(share, int | float)]
    if numbers and len(numbers) == len(classes) and not abs(sum(numbers) - 1.0) <= SHARE_TOLERANCE:
        yield Problem(path="class", message=f"shares sum to {sum(numbers):g}, must sum to 1")


def _check_spec(spec: Spec, path: str) -> Iterator[Problem]:
    del path  # the root
    names = [traffic.name for traffic in spec.classes]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem(path=f"class[{index}].name", message=f"{name!r} names an earlier class too")
    planned = spec.plan.duration_s * spec.arrivals.rate_rps
    if planned > MAX_PLANNED_REQUESTS:
        message = f"{planned:.0f} requests (plan.duration_s * rate_rps), at most {MAX_PLANNED_REQUESTS}"
        yield Problem(path="arrivals.rate_rps", message=message)
    if spec.run.warmup_s + spec.run.cooldown_s >= spec.plan.duration_s:
        yield Problem(path="run.warmup_s", message="warm-up and cool-down leave nothing of plan.duration_s to measure")


def _check_content(content: ContentSpec, path: str) -> Iterator[Problem]:
    if content.token_low >= content.token_high:
        yield Problem(path=f"{path}.token_low", message="must be less than token_high")


def _check_arrivals(arrivals: ArrivalSpec, path: str) -> Iterator[Problem]:
    match arrivals.process:
        case OnOff() as process:
            base = process.base_rps(arrivals.rate_rps)
            if base < 0:
                message = f"the sources' mean exceeds rate_rps by {-base:.3g} requests/s: lower p or c, or raise tau_s"
                yield Problem(path=f"{path}.process.sources", message=message)
        case Square(low=low, high=high) if high <= low:
            yield Problem(path=f"{path}.process.high", message=f"{high:g} must be greater than low = {low:g}")
        case _:
            pass


def _check_class(traffic: ClassSpec, path: str) -> Iterator[Problem]:
    wrong = (
        "a class of tasks has its lengths from them; drop one" if traffic.tasks else "missing, and no `tasks` either"
    )
    for name, length in (("input", traffic.input), ("output", traffic.output)):
        if (length is None) != bool(traffic.tasks):
            yield Problem(path=f"{path}.{name}", message=wrong)
    match traffic.prefix:
        case ShotsPrefix() if not traffic.tasks:
            yield Problem(
                path=f"{path}.prefix.kind", message="shots are worked examples of `tasks`, and there are none"
            )
        case GroupsPrefix() if traffic.tasks:
            yield Problem(path=f"{path}.prefix.kind", message="groups are of token ids; a class of tasks takes `shots`")
        case GroupsPrefix(tokens=tokens) if traffic.input is not None and (short := _shortest(traffic.input)) <= tokens:
            message = f"{tokens} must be less than the shortest input of {short} tokens"
            yield Problem(path=f"{path}.prefix.tokens", message=message)
        case _:
            pass


def _check_task(mix: TaskMix, path: str) -> Iterator[Problem]:
    for level in mix.levels:
        try:
            tasks.check(mix.task, level)
        except tasks.UnknownTaskError as error:
            yield Problem(path=path, message=str(error))
            return


def _check_uniform(length: Uniform, path: str) -> Iterator[Problem]:
    if length.low > length.high:
        yield Problem(path=f"{path}.low", message=f"{length.low} must not be greater than high = {length.high}")


def _check_lognormal(length: Lognormal, path: str) -> Iterator[Problem]:
    given = [(name, value) for name in ("p50", "mean", "p95") if (value := getattr(length, name)) is not None]
    if len(given) != 2:
        yield Problem(path=path, message=f"needs exactly two of mean, p50, p95, has {len(given)}")
        return
    # Listed from the least to the greatest that they can be.
    (lower, least), (upper, most) = given
    if most <= least:
        yield Problem(path=f"{path}.{upper}", message=f"{most:g} must be greater than {lower} = {least:g}")
    elif lower == "mean" and most > MAX_P95_OVER_MEAN * least:
        message = f"{most:g} is more than {MAX_P95_OVER_MEAN:g} x mean, and no lognormal is"
        yield Problem(path=f"{path}.{upper}", message=message)


def _shortest(length: Length) -> int:
    match length:
        case Fixed(tokens=tokens):
            return tokens
        case Uniform(low=low):
            return low
        case Lognormal():
            # Draws below the prefix are lifted to it plus one token (lengths.py), so only the cap can be too short.
            return length.max


RULES: Rules = {
    Spec: _check_spec,
    ContentSpec: _check_content,
    ArrivalSpec: _check_arrivals,
    ClassSpec: _check_class,
    TaskMix: _check_task,
    Uniform: _check_uniform,
    Lognormal: _check_lognormal,
}
