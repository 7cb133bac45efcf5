"""config.toml: what is accepted, what is refused, and that every refusal says where and what instead."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from msd.config import POLICY_NAMES, Config, InvalidConfigError, Problem, find, load, parse
from msd.config import __main__ as docs_command
from msd.config.docs import reference_page
from msd.config.positions import lines_of
from msd.config.read import annotations_of, sections
from msd.config.rules import SET_BY_MSD
from msd.engine.vllm_arguments import OWN
from msd.errors import EXIT_CONFIG, EXIT_NO, EXIT_OK, ConfigError
from msd.policy import POLICIES

MINIMAL = """\
[[model]]
name = "m"
[[engine]]
name = "a"
model = "m"
kind = "sim"
"""


def read(text: str, base_dir: Path = Path(), *, look_at_files: bool = True) -> Config:
    return parse(text, file="config.toml", base_dir=base_dir, look_at_files=look_at_files)


def problems(text: str, base_dir: Path = Path()) -> tuple[Problem, ...]:
    with pytest.raises(InvalidConfigError) as caught:
        read(text, base_dir)
    assert caught.value.exit_code == EXIT_CONFIG
    return caught.value.problems


def only_problem(text: str, base_dir: Path = Path()) -> Problem:
    (problem,) = problems(text, base_dir)
    return problem


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_minimal_file_gets_every_default() -> None:
    config = read(MINIMAL)
    assert config.engine[0].name == "a"
    assert config.engine[0].max_num_seqs == 32
    assert config.policy.name == "cost"
    assert config.limits.class_weights == {"interactive": 16, "standard": 4, "batch": 1}


def test_integers_stand_for_numbers_and_crlf_is_a_line_end() -> None:
    text = (MINIMAL + "[daemon]\ndrain_s = 5\n").replace("\n", "\r\n")
    assert read(text).daemon.drain_s == 5.0
    assert only_problem(text.replace("drain_s", "drain")).line == 8


def test_policy_names_are_those_that_are_registered() -> None:
    assert set(POLICY_NAMES) == set(POLICIES)


def test_every_field_of_the_schema_has_a_description_and_words_for_what_it_may_be() -> None:
    page = reference_page()
    for header, struct, _ in sections():
        assert (struct.__doc__ or "").strip(), header
        for name, annotation in annotations_of(struct).items():
            metas = getattr(annotation, "__metadata__", ())
            assert any(meta.description for meta in metas) or header in ("ingress",), f"{header}.{name}"
            if f"[{header}.{name}]" not in page:
                assert f"| `{name}` | " in page, f"{header}.{name}"


# --- every error at once, with its place -----------------------------------------------------------------------------

MANY = """\
drain_s = 5
[daemon]
log_level = "inf"
[limits]
max_wating = 5
max_attempts = 99
class_weights = { interactive = 1, standard = 2, batsh = 2 }
[ingress.zmq]
endpoints = [
  "ipc://",
  5,
]
[[model]]
name = "m"
[[engine]]
name = "a"
modle = "m"
[[engine]]
name = "a"
model = "mm"
kind = "sim"
precision = "int9"
quality = nan
[engine.sim]
step_ms = "8"
[policy]
name = "rulse"
mode = "b"
"""


def test_every_error_is_reported_at_once_with_line_field_value_and_remedy() -> None:
    with pytest.raises(InvalidConfigError) as caught:
        read(MANY)
    assert str(caught.value).splitlines() == [
        "config.toml:1: drain_s = 5: unknown key here; it belongs to [daemon] or [residency]",
        'config.toml:3: daemon.log_level = "inf": must be one of `debug`, `info`, `warning`, `error`; '
        "did you mean `info`?",
        "config.toml:5: limits.max_wating = 5: unknown key; did you mean `max_waiting`?",
        "config.toml:6: limits.max_attempts = 99: must be an integer from 1 to 16",
        "config.toml:7: limits.class_weights.batsh = 2: unknown key; did you mean `batch`?",
        "config.toml:11: ingress.zmq.endpoints[1] = 5: must be a string",
        "config.toml:15: engine[0].model: missing; it must be a name of at most 64 letters, digits, `.`, `_`, `-`",
        'config.toml:17: engine[0].modle = "m": unknown key; did you mean `model`?',
        'config.toml:19: engine[1].name = "a": the name is taken by engine[0]',
        'config.toml:20: engine[1].model = "mm": no [[model]] has this name; did you mean `m`?',
        'config.toml:22: engine[1].precision = "int9": must be one of `fp32`, `bf16`, `fp16`, `fp8`, `int8`, `int4`; '
        "did you mean `int8`?",
        "config.toml:23: engine[1].quality = NaN: must be a number from 0 to 1",
        'config.toml:25: engine[1].sim.step_ms = "8": must be a number from 0 to 10,000',
        'config.toml:27: policy.name = "rulse": there is no such policy; did you mean `rules`?',
        'config.toml:28: policy.mode = "b": no [[engine]] has this name; there is only `a`',
    ]


def test_single_brackets_where_double_ones_belong() -> None:
    problem = only_problem('[engine]\nname = "a"\nmodel = "m"\n')
    assert (problem.line, problem.field) == (1, "engine")
    assert problem.message == "must be an array of tables, each headed [[engine]]"


def test_a_value_where_a_table_belongs() -> None:
    assert "headed [daemon]" in only_problem("daemon = 5\n" + MINIMAL).message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = 1\nb = = 2\n", 2),
        ("a = 1\na = 2\n", 2),
        ('[daemon]\nlog_level = "info\n', 2),
        ("[daemon\n", 1),
        ("a = [1,\n2,\n", 3),
    ],
)
def test_what_is_not_toml_is_named_with_its_line(text: str, line: int) -> None:
    problem = only_problem(text)
    assert problem.message.startswith("not TOML: ")
    assert problem.line == line


def test_deep_nesting_is_an_answer_and_not_a_crash() -> None:
    assert "nested too deeply" in only_problem("a = " + "[" * 100_000).message


def test_no_engine_is_an_error() -> None:
    assert only_problem("").field == "engine"


def test_a_value_is_shortened() -> None:
    problem = only_problem(MINIMAL + f'[daemon]\nlog_level = "{"x" * 500}"\n')
    assert len(problem.value) == 60


# --- rules that span fields ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "more", "message"),
    [
        ("tcp://127.0.0.1:5555", "", "tcp without CURVE is refused"),
        ("tcp://0.0.0.0:5555", "insecure_tcp = true", "for loopback addresses only, and `0.0.0.0` is none"),
        ("tcp://*:5555", "insecure_tcp = true", "for loopback addresses only"),
        ("tcp://example.org:5555", "insecure_tcp = true", "for loopback addresses only"),
        ("tcp://127.0.0.1:99999", "insecure_tcp = true", "a port from 0 to 65535"),
        ("tcp://127.0.0.1", "insecure_tcp = true", "a port from 0 to 65535"),
        ("udp://127.0.0.1:5", "", "must be `ipc:///path` or `tcp://host:port`"),
        ("/run/msd/msd.sock", "", "must be `ipc:///path` or `tcp://host:port`"),
        ("ipc://msd.sock", "", "the path must be absolute"),
        ("ipc://@msd", "", "an abstract socket has no permissions"),
        ("ipc:///" + "x" * 120, "", "the path has 121 bytes; a socket's may have 107"),
    ],
)
def test_endpoints_that_are_refused(endpoint: str, more: str, message: str) -> None:
    problem = only_problem(f'{MINIMAL}[ingress.zmq]\nendpoints = ["{endpoint}"]\n{more}\n')
    assert (problem.field, problem.line) == ("ingress.zmq.endpoints[0]", 8)
    assert message in problem.message


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5555", "tcp://[::1]:0", "tcp://localhost:*", "ipc:///run/x"])
def test_endpoints_that_are_taken(endpoint: str) -> None:
    config = read(f'{MINIMAL}[ingress.zmq]\nendpoints = ["{endpoint}"]\ninsecure_tcp = true\n')
    assert config.ingress.zmq.endpoints == (endpoint,)


def test_one_endpoint_twice() -> None:
    assert "twice" in only_problem(MINIMAL + '[ingress.zmq]\nendpoints = ["ipc://", "ipc://"]\n').message


def test_curve_needs_its_files(tmp_path: Path) -> None:
    text = MINIMAL + '[ingress.zmq]\nendpoints = ["tcp://0.0.0.0:5555"]\ncurve_secret_key_file = "server.key"\n'
    fields = [problem.field for problem in problems(text, tmp_path)]
    assert fields == ["ingress.zmq.curve_keys_dir", "ingress.zmq.curve_secret_key_file"]
    (tmp_path / "server.key").write_text("x")
    (tmp_path / "keys").mkdir()
    assert read(text + 'curve_keys_dir = "keys"\n', tmp_path).ingress.zmq.endpoints == ("tcp://0.0.0.0:5555",)


def test_fixed_names_a_mode_that_exists() -> None:
    problem = only_problem(MINIMAL + '[policy]\nname = "fixed"\nmode = "b"\n')
    assert (problem.field, problem.value) == ("policy.mode", '"b"')


def test_one_user_id_is_one_tenants() -> None:
    text = MINIMAL + '[[tenant]]\nname = "x"\nuids = [1, 2]\n[[tenant]]\nname = "y"\nuids = [3,\n2]\n'
    problem = only_problem(text)
    assert (problem.field, problem.line) == ("tenant[1].uids[1]", 13)
    assert "tenant `x`" in problem.message


def test_simulated_weights_must_fit_and_the_sum_is_shown() -> None:
    text = """\
[[model]]
name = "m"
[[engine]]
name = "a"
model = "m"
kind = "sim"
sim = { weights_bytes = 6_000 }
[[engine]]
name = "b"
model = "m"
kind = "sim"
sim = { weights_bytes = 5_000 }
[telemetry]
sim_memory_bytes = 10_000
"""
    problem = only_problem(text)
    assert (problem.field, problem.line) == ("telemetry.sim_memory_bytes", 14)
    assert problem.message == (
        "the simulated engines' weights_bytes need 11,000 (a 6,000 + b 5,000), 1,000 more than there is"
    )
    assert read(text.replace("10_000", "11_000")).telemetry.sim_memory_bytes == 11_000


def test_the_longest_simulated_request_must_fit_its_cache() -> None:
    assert only_problem(MINIMAL + "[engine.sim]\nkv_capacity_tokens = 100\n").field == "engine[0].sim.max_model_len"


def test_partial_class_weights_are_refused() -> None:
    problem = only_problem(MINIMAL + "[limits.class_weights]\ninteractive = 2\nstandard = 1\n")
    assert problem.field == "limits.class_weights.batch"


def test_rules_thresholds_must_not_overlap() -> None:
    text = MINIMAL + "[policy.rules]\nshort_output_tokens = 200\nshort_prompt_tokens = 800\n"
    assert [problem.line for problem in problems(text)] == [8, 9]


def vllm_engine(tmp_path: Path, more: str = "") -> str:
    (tmp_path / "weights").mkdir(exist_ok=True)
    (tmp_path / "weights" / "config.json").write_text("{}")
    return f'[[model]]\nname = "m"\npath = "weights"\n[[engine]]\nname = "a"\nmodel = "m"\n{more}\n'


def test_model_folders_are_looked_for_beside_the_file(tmp_path: Path) -> None:
    text = vllm_engine(tmp_path)
    assert read(text, tmp_path).engine[0].kind == "vllm"
    assert "there is no folder" in only_problem(text, tmp_path / "elsewhere").message
    assert "has no config.json" in only_problem(text.replace('"weights"', '"."'), tmp_path).message
    assert only_problem(text.replace('path = "weights"', ""), tmp_path).field == "model[0].path"
    assert read(text, tmp_path / "elsewhere", look_at_files=False).model[0].path == "weights"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ('speculation = "ngram"', "engine[0].speculation"),
        ('args = { speculative_config = { method = "ngram" } }', "engine[0].args.speculative_config"),
        ('args = { model = "x" }', "engine[0].args.model"),
        ("args = { max_num_seqs = 3 }", "engine[0].args.max_num_seqs"),
        ("args = { enable_prefix_caching = true }", "engine[0].args.enable_prefix_caching"),
        ('weights = "nowhere"', "engine[0].weights"),
        ("env = { A = 1 }", "engine[0].env.A"),
    ],
)
def test_engine_recipes_that_contradict_themselves(tmp_path: Path, more: str, field: str) -> None:
    problem = only_problem(vllm_engine(tmp_path, more), tmp_path)
    assert (problem.field, problem.line) == (field, 7)


def test_arguments_that_the_installed_vllm_lacks(tmp_path: Path) -> None:
    text = vllm_engine(tmp_path, "args = { max_model_len = 64, max_modle_len = 64 }")
    known = {"max_model_len", "dtype"}
    with pytest.raises(InvalidConfigError) as caught:
        parse(text, file="x", base_dir=tmp_path, engine_arguments=known)
    (problem,) = caught.value.problems
    assert (problem.field, problem.line) == ("engine[0].args.max_modle_len", 7)
    assert "did you mean `max_model_len`?" in problem.message
    assert read(text, tmp_path).engine[0].args["max_modle_len"] == 64, "unchecked where nobody knows the names"


def test_engine_and_configuration_agree_on_what_msd_sets() -> None:
    assert set(SET_BY_MSD) == set(OWN)


# --- where the file is looked for ------------------------------------------------------------------------------------


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("msd.config.file.SYSTEM_PATH", tmp_path / "etc.toml")
    for name in ("a.toml", "b.toml", "config.toml", "etc.toml"):
        (tmp_path / name).write_text(MINIMAL)
    environ = {"MSD_CONFIG": str(tmp_path / "b.toml")}
    assert find(tmp_path / "a.toml", environ).name == "a.toml"
    assert find(None, environ).name == "b.toml"
    assert find(None, {}).name == "config.toml"
    (tmp_path / "config.toml").unlink()
    assert find(None, {}).name == "etc.toml"
    (tmp_path / "etc.toml").unlink()
    with pytest.raises(ConfigError, match="neither"):
        find(None, {})


def test_a_named_file_that_is_missing_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"\$MSD_CONFIG"):
        find(None, {"MSD_CONFIG": "nowhere.toml"})
    with pytest.raises(ConfigError, match="--config"):
        find("nowhere.toml", {})


def test_load_names_the_file_in_every_problem(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[daemon]\ndrain = 1\n")
    with pytest.raises(InvalidConfigError) as caught:
        load(file)
    assert all(line.startswith(str(file)) for line in str(caught.value).splitlines())
    file.write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(InvalidConfigError, match=r"x.toml:2: is not UTF-8"):
        load(file)
    file.write_bytes(b"#" * (1024 * 1024 + 1))
    with pytest.raises(ConfigError, match="no configuration"):
        load(file)


# --- the reader agrees with msgspec, the scanner with tomllib --------------------------------------------------------

KEYS = sorted({name for _, struct, _ in sections() for name in annotations_of(struct)} | {"typo", "a b", "é"})
SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.sampled_from(["", "a", "ipc://", "sim", "rules", 'q"\\', "'''", "two\nlines", "#"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(
    st.sampled_from([name for name in annotations_of(Config)]),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)
    | st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), max_size=3)
    | VALUES,
    max_size=5,
)


def refusal(text: str) -> InvalidConfigError | None:
    try:
        read(text, look_at_files=False)
    except InvalidConfigError as error:
        return error
    return None


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS)
def test_whatever_stands_in_a_file_is_accepted_or_explained(document: dict[str, Any]) -> None:
    text = tomlkit.dumps(document)
    error = refusal(text)
    if error is None:
        msgspec.convert(tomllib.loads(text), Config)
    else:
        num_lines = text.count("\n") + 1
        assert error.problems
        assert all(problem.line is None or 1 <= problem.line <= num_lines for problem in error.problems)


def paths_of(value: object, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    children: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return {path}.union(*(paths_of(child, (*path, key)) for key, child in children))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("ab.\" '#=é", min_size=1, max_size=4), VALUES, max_size=5))
def test_every_setting_has_a_line_and_its_key_stands_on_it(document: dict[str, Any]) -> None:
    text = tomlkit.dumps(document)
    lines = lines_of(text)
    decoded = tomllib.loads(text)
    assert set(lines) == paths_of(decoded) - {()}
    for path, line in lines.items():
        if len(path) == 1 and str(path[0]).isalpha():
            assert str(path[0]) in text.split("\n")[line - 1]


def test_lines_of_what_tomlkit_does_not_write() -> None:
    text = '''\
# a comment = 1
a.b = 1   # dotted
"c d" = """
x = 1 """
[t.u]
list = [ 1, # ]
  { k = 1, l = [ 2,
    3 ] }, "]" ]
[[array]]
n = 'x'
[array.sub]
deep.er = inf
[[array]]
n = 2
[t]
late = 1979-05-27T07:32:00Z
'''
    lines = lines_of(text)
    assert set(lines) == paths_of(tomllib.loads(text)) - {()}
    expected = {
        ("a", "b"): 2,
        ("c d",): 3,
        ("t", "u"): 5,
        ("t", "u", "list"): 6,
        ("t", "u", "list", 1, "l", 1): 8,
        ("t", "u", "list", 2): 8,
        ("array", 0, "n"): 10,
        ("array", 0, "sub", "deep", "er"): 12,
        ("array", 1): 13,
        ("t", "late"): 16,
    }
    assert {path: lines[path] for path in expected} == expected


# --- the reference page ----------------------------------------------------------------------------------------------


def test_docs_command_tells_whether_the_page_is_in_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "deep" / "config.md"
    assert docs_command.main(["--check-docs", str(page)]) == EXIT_NO
    assert docs_command.main(["--write-docs", str(page)]) == EXIT_OK
    assert docs_command.main(["--check-docs", str(page)]) == EXIT_OK
    page.write_text(page.read_text().replace("drain_s", "drain_ms"))
    assert docs_command.main(["--check-docs", str(page)]) == EXIT_NO
    assert "make docs" in capsys.readouterr().err


ANNOTATIONS = [
    pytest.param(annotation, id=f"{header}.{name}")
    for header, struct, _ in sections()
    for name, annotation in annotations_of(struct).items()
]


@pytest.mark.parametrize("hostile", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("annotation", ANNOTATIONS)
def test_no_number_of_the_schema_lets_nan_or_infinity_pass(annotation: Any, hostile: float) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(hostile, annotation)
