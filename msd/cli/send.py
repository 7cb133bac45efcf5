"""`msd send`: one request to the running daemon, its answer streamed. Needs only what a producer has installed."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

import msgspec

from msd.cli import terminal
from msd.cli.options import Commands, add_endpoint, add_json, count, positive
from msd.cli.terminal import number, paint
from msd.errors import EXIT_NO, EXIT_OK, EXIT_USAGE
from msd.wire import Done, EnergyFields, ModeHint, SamplingFields, SloFields

if TYPE_CHECKING:
    from msd.client import Handle
    from msd.client.submits import SubmitFields


def add_to(commands: Commands) -> None:
    """Add `send` to the command line."""
    parser = commands.add_parser(
        "send",
        help="send one request to the running daemon and stream its answer",
        description="Send one request and stream its answer to stdout; how it was served goes to stderr. Exit 1 when "
        "the daemon refuses it, 69 when none answers. Ctrl-C cancels the request.",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from stdin")
    parser.add_argument("--max-tokens", type=count, default=64, metavar="N", help="length of the answer (default 64)")
    parser.add_argument("--model", metavar="NAME", help="a [[model]] of the daemon (default: any)")
    parser.add_argument("--mode", metavar="NAME", help="this mode or an error (default: msd chooses)")
    parser.add_argument("--task", metavar="WORD", help="what kind of work it is: a hint for routing")
    parser.add_argument(
        "--class", dest="service_class", choices=("interactive", "standard", "batch"), default="interactive",
        help="service class (default interactive)",
    )  # fmt: skip
    parser.add_argument("--quality-floor", type=float, metavar="X", help="least accuracy of the mode, 0 to 1")
    parser.add_argument("--deadline-ms", type=positive, metavar="MS", help="no answer is wanted after this long")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token each time"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    parser.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")
    parser.add_argument("--timeout-s", type=positive, default=600.0, metavar="S", help="for the answer (default 600)")
    add_endpoint(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the answer; exit 1 when the daemon refused the request."""
    from msd.client import AnswerTimeoutError, Client, RequestError

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not _is_text(prompt):
        terminal.complain("the prompt is not UTF-8")
        return EXIT_USAGE
    try:
        # Somebody watches: a refusal is worth more than a silent second try, whatever the wire calls retryable.
        with Client(options.endpoint, retry_s=0) as client:
            return answer(client.submit(prompt, max_tokens=options.max_tokens, **fields_of(options)), options)
    except (RequestError, AnswerTimeoutError) as error:
        if options.json:
            code = error.code if isinstance(error, RequestError) else "timeout"
            print(json.dumps({"ok": False, "code": code, "message": str(error)}, ensure_ascii=False))
        else:
            terminal.complain(str(error))
        return EXIT_NO


def _is_text(prompt: str) -> bool:
    """Whether it can be sent: bytes of stdin that are no UTF-8 arrive as lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def fields_of(options: argparse.Namespace) -> SubmitFields:
    """The submit's fields; what was not given is not sent."""
    fields: SubmitFields = {
        "stream": not options.no_stream and not options.json,
        "service_class": options.service_class,
        "sampling": SamplingFields(temperature=options.temperature, seed=options.seed),
    }
    if options.model is not None:
        fields["model"] = options.model
    if options.task is not None:
        fields["task"] = options.task
    if options.quality_floor is not None:
        fields["quality_floor"] = options.quality_floor
    if options.deadline_ms is not None:
        fields["slo"] = SloFields(deadline_ms=options.deadline_ms)
    if options.mode is not None:
        fields["mode_hint"] = ModeHint(mode=options.mode, strict=True)
    return fields


def answer(handle: Handle, options: argparse.Namespace) -> int:
    """Print what comes; cancel the request on Ctrl-C, or when it takes too long."""
    from msd.client import AnswerTimeoutError

    streams = not options.no_stream and not options.json
    try:
        if streams:
            show_stream(handle, options.timeout_s)
        done = handle.result(options.timeout_s)
    except (KeyboardInterrupt, AnswerTimeoutError):
        handle.cancel()
        raise
    if options.json:
        print(json.dumps({"ok": True, **msgspec.to_builtins(done)}, ensure_ascii=False))
        return EXIT_OK
    if not streams:
        print(done.text)
    print(paint(story(done), "dim", stream=sys.stderr), file=sys.stderr)
    return EXIT_OK


def show_stream(handle: Handle, timeout_s: float) -> None:
    """Print the Deltas as they come."""
    num_tokens = 0
    for delta in handle.deltas(timeout_s):
        if delta.index == 0 and num_tokens:
            print(flush=True)
            print(paint("the engine was lost; from the beginning:", "yellow", stream=sys.stderr), file=sys.stderr)
        num_tokens += len(delta.token_ids)
        print(delta.text, end="", flush=True)
    print(flush=True)


def story(done: Done) -> str:
    """How the request was served, in one line."""
    timings, usage = done.timings, done.usage
    parts = [
        f"{done.mode}: {done.reason}",
        f"{usage.completion} tokens ({done.finish_reason})",
        f"TTFT {number(timings.ttft_ms, 'ms')}",
        f"TPOT {number(timings.tpot_ms, 'ms')}" if usage.completion > 1 else "",
        f"in all {number(timings.e2e_ms, 'ms')}",
        energy(done.energy),
        f"request {done.request_id}",
    ]
    return ", ".join(part for part in parts if part)


def energy(fields: EnergyFields | None) -> str:
    """Joules with their source, or a dash where nothing was measured."""
    if fields is None:
        return f"energy {terminal.DASH}"
    provisional = "" if fields.settled else ", provisional"
    return f"{fields.energy_mj / 1000:,.3f} J ({fields.source}{provisional})"
