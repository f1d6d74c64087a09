"""The workload of the correctness suite, as data: what is asked, when, and what each request is there to show.

The same list is given to stock vLLM, to KevlarFlow without a fault, and to KevlarFlow while nodes die. Each
request names the features that it covers, so a test can say which of them a set of requests still holds.

Prompts are plain English, on purpose: random token ids give flat distributions, whose near ties let two correct
implementations disagree.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from typing import Any

MODEL = "smollm2-135m-instruct"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@dataclasses.dataclass(frozen=True)
class Request:
    """One request of a workload."""

    name: str
    path: str
    body: dict[str, Any]
    covers: frozenset[str]
    at: float = 0.0
    """Seconds after the start of the workload, or after the end of `after`."""
    after: str | None = None
    """Name of the request that has to be finished first."""
    pipeline: int | None = None
    """The pipeline that has to serve it; None leaves the choice to vLLM's load balancer."""
    cancel_after_events: int | None = None
    """Disconnect after that many events."""

    @property
    def streams(self) -> bool:
        """Whether the answer comes as server-sent events."""
        return bool(self.body.get("stream"))

    @property
    def greedy(self) -> bool:
        """Whether each token is the one with the best raw logprob, so that a margin can be read off."""
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        return self.body["temperature"] == 0 and not any(name in self.body for name in penalties)


def completion(name: str, prompt: str, covers: str, *, max_tokens: int = 24, **fields: Any) -> Request:
    """A streamed text completion. Fields of `Request` and of the body may be given alike."""
    return _request(name, COMPLETIONS, {"prompt": prompt, "max_tokens": max_tokens}, covers, fields)


def chat(name: str, question: str, covers: str, *, max_tokens: int = 24, **fields: Any) -> Request:
    """A streamed chat completion."""
    messages = [{"role": "user", "content": question}]
    return _request(name, CHAT, {"messages": messages, "max_completion_tokens": max_tokens}, covers, fields)


def passage(seed: int, sentences: int) -> str:
    """English text of about 17 tokens a sentence, the same for the same arguments."""
    pick = random.Random(seed)
    people = (
        "The captain",
        "An old farmer",
        "The librarian",
        "My neighbour",
        "The engineer",
        "A young doctor",
    )
    deeds = (
        "walked to",
        "wrote a letter about",
        "repaired a bridge near",
        "told a story of",
        "drew a map of",
    )
    places = ("the quiet harbour", "a village in the hills", "the northern station", "the river market")
    times = ("early in spring", "after the long winter", "on a rainy evening", "before the festival")
    return " ".join(
        f"{pick.choice(people)} {pick.choice(deeds)} {pick.choice(places)} {pick.choice(times)},"
        f" and it took {pick.randint(2, 98)} days."
        for _ in range(sentences)
    )


def with_predecessors(requests: Iterable[Request]) -> list[Request]:
    """The requests, and those of the whole workload that they come after."""
    return named(*(request.name for request in requests))


def covered(requests: Iterable[Request]) -> frozenset[str]:
    """Every feature that the requests cover."""
    return frozenset().union(*(request.covers for request in requests))


def by_name(requests: Iterable[Request]) -> dict[str, Request]:
    """The requests under their names, which must be distinct."""
    table: dict[str, Request] = {}
    for request in requests:
        if request.name in table:
            raise ValueError(f"two requests are called {request.name}")
        table[request.name] = request
    return table


def _request(name: str, path: str, body: dict[str, Any], covers: str, fields: dict[str, Any]) -> Request:
    own = {field.name for field in dataclasses.fields(Request)}
    chosen = {key: fields.pop(key) for key in list(fields) if key in own}
    body = {"model": MODEL, "temperature": 0, "return_token_ids": True, **body, **fields}
    if body.setdefault("stream", True):
        body["stream_options"] = {"include_usage": True}
    return Request(name=name, path=path, body=body, covers=frozenset(covers.split()), **chosen)


_CITY_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "country": {"type": "string", "maxLength": 12},
        "population": {"type": "integer", "maximum": 99999999, "minimum": 0},
        "coastal": {"type": "boolean"},
    },
    "required": ["name", "country", "population", "coastal"],
    "additionalProperties": False,
}
_JSON_CITY = {"type": "json_schema", "json_schema": {"name": "city", "schema": _CITY_SCHEMA}}

_SHARED_LEFT = "You are a careful editor. " + passage(1, 9)
_SHARED_RIGHT = "Here are the minutes of the meeting. " + passage(2, 9)


def _plain() -> list[Request]:
    return [
        completion("plain-0", "The history of the bicycle begins with", "greedy", max_tokens=40, pipeline=0),
        completion("plain-1", "Water boils at a temperature of", "greedy", max_tokens=40, pipeline=1),
        chat("chat-plain", "What is the capital of France?", "greedy chat", pipeline=0, at=0.6),
        chat("chat-late", "Name three colours of the rainbow.", "greedy chat staggered", at=1.1, pipeline=1),
        completion("late-free", "In the morning the ship", "greedy staggered", at=1.6),
    ]


def _long() -> list[Request]:
    # The first two come when the prefixes have been hit, and while few others run: the KV memory has room, so that
    # cached blocks survive until then and these prefills start at once.
    return [
        completion(
            "long-greedy",
            passage(10, 30) + " In short,",
            "greedy long",
            at=0.25,
            after="prefix-left",
            pipeline=0,
        ),
        completion(
            "long-seeded",
            passage(11, 22) + " To sum up,",
            "long seeded",
            temperature=0.9,
            seed=77,
            at=0.25,
            after="prefix-right",
            pipeline=1,
        ),
        chat(
            "long-chat-penalties",
            "Summarise this: " + passage(12, 14),
            "long penalties chat",
            repetition_penalty=1.2,
            presence_penalty=0.3,
            at=0.1,
            after="prefix-left-again",
            pipeline=0,
        ),
        completion(
            "long-echo",
            passage(13, 13),
            "long prompt-logprobs logprobs",
            max_tokens=6,
            echo=True,
            logprobs=2,
            return_tokens_as_token_ids=True,
            at=0.1,
            after="prefix-right-again",
            pipeline=1,
        ),
    ]


def _prefixes() -> list[Request]:
    return [
        completion("prefix-left", _SHARED_LEFT + " The first", "prefix greedy", max_tokens=16, at=0.8, pipeline=0),
        completion(
            "prefix-left-again",
            _SHARED_LEFT + " The second",
            "prefix-hit greedy",
            after="prefix-left",
            pipeline=0,
        ),
        chat("prefix-right", _SHARED_RIGHT + " Who was there?", "prefix chat", max_tokens=16, at=0.8, pipeline=1),
        chat(
            "prefix-right-again",
            _SHARED_RIGHT + " What was said?",
            "prefix-hit chat seeded",
            temperature=0.8,
            seed=5,
            after="prefix-right",
            pipeline=1,
        ),
    ]


def _sampling() -> list[Request]:
    return [
        completion("seeded", "Once upon a time", "seeded", temperature=1.0, seed=1234, max_tokens=40, pipeline=0),
        chat(
            "seeded-top",
            "Tell me a joke about a cat.",
            "seeded chat",
            temperature=0.7,
            top_p=0.9,
            top_k=40,
            min_p=0.01,
            seed=9,
            max_tokens=40,
            at=0.2,
            pipeline=1,
        ),
        completion(
            "penalties",
            "apple pear apple pear apple",
            "penalties",
            repetition_penalty=1.3,
            presence_penalty=0.5,
            frequency_penalty=0.6,
            max_tokens=40,
            at=0.5,
            pipeline=0,
        ),
        completion(
            "penalties-seeded",
            "The recipe needs flour, sugar,",
            "penalties seeded",
            temperature=0.8,
            seed=42,
            frequency_penalty=0.8,
            logit_bias={"198": -100},
            max_tokens=32,
            at=0.6,
            pipeline=1,
        ),
        completion(
            "choices",
            "My favourite animal is",
            "choices seeded",
            n=3,
            temperature=0.9,
            seed=7,
            max_tokens=16,
            at=0.8,
            pipeline=0,
        ),
        chat(
            "chat-choices",
            "Give me a name for a boat.",
            "choices seeded chat",
            n=2,
            temperature=1.0,
            seed=8,
            max_tokens=16,
            at=1.0,
            pipeline=1,
        ),
    ]


def _endings() -> list[Request]:
    counting = "one, two, three, four, five, six, seven, eight, nine, ten, one, two, three, four,"
    return [
        completion("stop", counting, "stop greedy", max_tokens=32, stop=["eight, n", "zebra"], at=0.3, pipeline=0),
        chat(
            "stop-chat",
            "List five fruits, separated by commas.",
            "stop chat",
            stop=["\n4"],
            include_stop_str_in_output=True,
            max_tokens=32,
            at=0.5,
            pipeline=1,
        ),
        completion(
            "min-tokens",
            "Yes or no: is the sky blue? Answer:",
            "greedy",
            min_tokens=12,
            max_tokens=20,
            at=0.9,
            pipeline=1,
        ),
    ]


def _logprobs() -> list[Request]:
    return [
        completion(
            "logprobs",
            "The largest planet is",
            "logprobs greedy",
            logprobs=4,
            return_tokens_as_token_ids=True,
            max_tokens=20,
            at=0.2,
            pipeline=1,
        ),
        chat(
            "chat-logprobs",
            "Is fire hot or cold?",
            "logprobs chat seeded",
            logprobs=True,
            top_logprobs=3,
            return_tokens_as_token_ids=True,
            temperature=0.6,
            seed=3,
            max_tokens=20,
            at=0.7,
            pipeline=0,
        ),
        completion(
            "prompt-logprobs",
            passage(14, 5),
            "prompt-logprobs",
            prompt_logprobs=2,
            stream=False,
            max_tokens=8,
            at=0.4,
            pipeline=0,
        ),
    ]


def _structured() -> list[Request]:
    return [
        chat(
            "json",
            "Describe Lisbon as JSON.",
            "json chat greedy",
            response_format=_JSON_CITY,
            max_tokens=56,
            at=0.1,
            pipeline=0,
        ),
        completion(
            "json-seeded",
            "A city as JSON: ",
            "json seeded",
            response_format=_JSON_CITY,
            temperature=0.7,
            seed=21,
            max_tokens=56,
            at=0.6,
            pipeline=1,
        ),
    ]


def _cancelled() -> list[Request]:
    return [
        completion(
            "cancelled-0",
            "A very long list of animals: cat, dog,",
            "cancel greedy",
            max_tokens=60,
            cancel_after_events=6,
            ignore_eos=True,
            at=0.4,
            pipeline=0,
        ),
        chat(
            "cancelled-1",
            "Write a long poem about the sea.",
            "cancel chat seeded",
            max_tokens=60,
            cancel_after_events=9,
            ignore_eos=True,
            temperature=0.8,
            seed=6,
            at=0.5,
            pipeline=1,
        ),
    ]


def _burst() -> list[Request]:
    """More live tokens than a small KV memory holds, so that running requests are preempted."""
    return [
        completion(
            f"burst-{index}",
            passage(100 + index, 6) + " And then",
            "preemption seeded" if index % 3 == 0 else "preemption greedy",
            max_tokens=44,
            ignore_eos=True,
            at=0.02 * index,
            after=("long-greedy", "long-seeded")[index % 2],
            pipeline=index % 2,
            **({"temperature": 0.7, "seed": 300 + index} if index % 3 == 0 else {}),
        )
        for index in range(16)
    ]


def full() -> list[Request]:
    """Everything: the set that is compared with stock vLLM, with and without failures."""
    groups = (_plain, _long, _prefixes, _sampling, _endings, _logprobs, _structured, _cancelled, _burst)
    return [request for group in groups for request in group()]


def cached() -> list[Request]:
    """Prompts that share a prefix of several blocks, which a request hits after another has finished."""
    left, right = "This is a play in five acts. " + passage(3, 9), "Dear diary, today " + passage(4, 9)
    return [
        completion("cache-a-first", left + " The king", "prefix greedy", max_tokens=12, pipeline=0),
        completion("cache-a-again", left + " The queen", "prefix-hit greedy", max_tokens=12, pipeline=0),
        completion("cache-a-third", left + " The fool", "prefix-hit greedy", max_tokens=12, pipeline=0),
        completion("cache-b-first", right + " It was", "prefix greedy", max_tokens=48, pipeline=0),
        completion("cache-b-again", right + " There was", "prefix-hit greedy", max_tokens=12, pipeline=0),
    ]


def steady() -> list[Request]:
    """Streams that go on for a while, two for each of three pipelines."""
    beginnings = ("The sun", "A river", "My house", "Their music", "The forest", "His ship")
    return [
        completion(
            f"steady-{index}",
            beginning,
            "greedy" if index < 3 else "seeded",
            max_tokens=96,
            ignore_eos=True,
            pipeline=index % 3,
            **({} if index < 3 else {"temperature": 0.8, "seed": 500 + index}),
        )
        for index, beginning in enumerate(beginnings)
    ]


def everything() -> list[Request]:
    """Whatever any test compares with stock vLLM."""
    return [*full(), *cached(), *steady()]


def named(*names: str) -> list[Request]:
    """Requests by their names, and those that they have to come after."""
    table = by_name(everything())
    chosen: dict[str, Request] = {}
    for name in names:
        for each in [*_predecessors(table, name), name]:
            chosen[each] = table[each]
    return list(chosen.values())


def _predecessors(table: dict[str, Request], name: str) -> list[str]:
    before = table[name].after
    return [] if before is None else [*_predecessors(table, before), before]
