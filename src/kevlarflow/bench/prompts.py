"""What is asked: prompts of 100 to 300 tokens, none of which begins as another does.

They differ from the first words on, so that no prefix cache helps, and are the same for the same seed, so that two
systems are given the same work. How long each is does not depend on the seed, so that rounds can be compared.
"""

from __future__ import annotations

import random

from kevlarflow.bench.streams import Request, completion

WHO = (
    "The captain", "An old farmer", "The librarian", "My neighbour", "The engineer", "A young doctor", "The baker",
    "A travelling painter", "The watchmaker's daughter", "Our teacher",
)  # fmt: skip
DID = (
    "walked to", "wrote a letter about", "repaired a bridge near", "told a story of", "drew a map of", "remembered",
    "sold a horse at", "was looking for",
)  # fmt: skip
WHERE = (
    "the quiet harbour", "a village in the hills", "the northern station", "the river market", "the empty theatre",
    "an orchard behind the mill", "the lighthouse", "the old observatory",
)  # fmt: skip
WHEN = (
    "before the first snow", "on a Sunday morning", "after the long war", "when the lamps were lit", "in late summer",
    "while it rained", "at the end of the year",
)  # fmt: skip

FEWEST_SENTENCES, MOST_SENTENCES = 6, 17
"""A sentence is some 16 tokens long."""
ORDINARY_TOKENS = range(1_000, 30_000)
"""Token ids that every tokenizer of use has, and that end nothing."""


def passage(seed: str, count: int = FEWEST_SENTENCES) -> str:
    """A passage of `count` sentences, to be continued."""
    chance = random.Random(seed)
    sentences = [
        f"{chance.choice(WHO)} {chance.choice(DID)} {chance.choice(WHERE)} {chance.choice(WHEN)}." for _ in range(count)
    ]
    return f"Chapter {chance.randint(1000, 999_999)}. " + " ".join(sentences)


def token_prompt(seed: str, count: int) -> list[int]:
    """A prompt of exactly `count` tokens, which mean nothing."""
    chance = random.Random(seed)
    return [chance.choice(ORDINARY_TOKENS) for _ in range(count)]


def clients(seed: str, streams: int, requests_each: int, tokens: int, pipelines: int) -> list[list[Request]]:
    """The requests of each client of a closed loop, `tokens` output tokens each, spread evenly over the pipelines."""
    return [
        [
            completion(
                name=f"client {client} request {number}",
                prompt=passage(f"{seed}/{client}/{number}", _sentences(client, number)),
                tokens=tokens,
                pipeline=(client + number) % pipelines,
            )
            for number in range(requests_each)
        ]
        for client in range(streams)
    ]


def _sentences(client: int, number: int) -> int:
    lengths = MOST_SENTENCES - FEWEST_SENTENCES + 1
    return FEWEST_SENTENCES + (7 * client + 5 * number) % lengths
