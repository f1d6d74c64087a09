"""What a recording says, without what may differ between two correct servers.

Ids and times are dropped. vLLM's server puts several tokens into one event when its client or its own loop was slow,
so where the cuts lie is an accident: a transcript holds the tokens one by one, the text up to each cut, and the
logprob entries one by one. Everything else that an event carries (roles, usage, prompt tokens, fields that this
module has never heard of) is kept as it came, in order, with repetitions of the same thing folded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from parity.client import Recording

_ACCIDENTAL = ("id", "created", "system_fingerprint", "request_id")


@dataclasses.dataclass
class Choice:
    """One of the `n` answers to a request."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    cuts: dict[int, str] = dataclasses.field(default_factory=dict)
    """The text so far after so many tokens, at each event's end."""
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    frames: list[Any] = dataclasses.field(default_factory=list)
    """What else the events of this choice carried; repetitions folded."""
    finish_reason: str | None = None
    after_finish: int = 0
    """Events that came after the one with the finish reason."""


@dataclasses.dataclass
class Transcript:
    """What one request got, comparable."""

    choices: dict[int, Choice] = dataclasses.field(default_factory=dict)
    rest: list[Any] = dataclasses.field(default_factory=list)
    """Events without a choice: usage, errors."""
    prompt_logprobs: list[Any] = dataclasses.field(default_factory=list)


def transcribe(recording: Recording) -> Transcript:
    """The transcript of a recording."""
    transcript = Transcript()
    for event in recording.events:
        frame = {key: value for key, value in event.items() if key not in _ACCIDENTAL}
        choices = frame.pop("choices", None)
        if not choices:
            transcript.rest.append(frame)
            continue
        if (usage := frame.pop("usage", None)) is not None:
            transcript.rest.append({"usage": usage})
        for choice in choices:
            _add(transcript, dict(choice), frame)
    return transcript


def _add(transcript: Transcript, event: dict[str, Any], frame: dict[str, Any]) -> None:
    choice = transcript.choices.setdefault(event.pop("index"), Choice())
    choice.after_finish += choice.finish_reason is not None
    choice.finish_reason = event.pop("finish_reason", None) or choice.finish_reason
    choice.logprobs += _entries(event.pop("logprobs", None))
    choice.tokens += event.pop("token_ids", None) or []
    choice.text += _take_text(event)
    choice.cuts[len(choice.tokens)] = choice.text
    transcript.prompt_logprobs += event.pop("prompt_logprobs", None) or []
    transcript.prompt_logprobs += frame.pop("prompt_logprobs", None) or []
    kept = {key: value for key, value in {**frame, **event}.items() if value not in (None, {}, [])}
    if kept not in choice.frames:
        choice.frames.append(kept)


def _take_text(event: dict[str, Any]) -> str:
    text = event.pop("text", None) or ""
    for holder in ("delta", "message"):
        if holder in event:
            event[holder] = dict(event[holder])
            text += event[holder].pop("content", None) or ""
    return text


def _entries(logprobs: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Logprobs by token, with the alternatives under their names: the two endpoints write them differently."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return [
            {
                "token": entry["token"],
                "logprob": entry["logprob"],
                "top": {other["token"]: other["logprob"] for other in entry["top_logprobs"]},
            }
            for entry in logprobs["content"] or ()
        ]
    columns = (logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"))
    return [
        {"token": token, "logprob": logprob, "top": top or {}, "offset": offset}
        for token, logprob, top, offset in zip(*columns, strict=True)
    ]
