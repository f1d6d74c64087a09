"""A streaming completion server that can be told to do wrong: the harness has to see it.

    python faulty_server.py PORT MODE

Its tokens are a function of the prompt. The request whose prompt came third is the one that MODE befalls.
"""

import asyncio
import json
import os
import sys
import zlib

import uvicorn

PORT, MODE = int(sys.argv[1]), sys.argv[2]
STRICKEN = 3
TOKEN_SECONDS = 0.005
LATE_SECONDS = 0.5
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream")]
prompts = []


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] != "/v1/completions":
        status = 503 if MODE == "never-ready" else 200
        await send({"type": "http.response.start", "status": status, "headers": JSON})
        await send({"type": "http.response.body", "body": b"{}"})
        return
    if MODE == "has-one-pipeline" and dict(scope["headers"]).get(b"x-data-parallel-rank") not in (None, b"0"):
        await send({"type": "http.response.start", "status": 400, "headers": JSON})
        await send({"type": "http.response.body", "body": b'"data_parallel_rank is out of range"'})
        return
    body = json.loads((await receive())["body"])
    # What warms the system up is left alone.
    if not body["prompt"].startswith("warm") and body["max_tokens"] != 8:
        prompts.append(body["prompt"])
    mode = MODE if len(prompts) == STRICKEN else "well"
    await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
    async for event in events(body, mode):
        await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def events(body, mode):
    if mode == "dies":
        os._exit(3)
    if MODE == "late" and prompts:
        await asyncio.sleep(LATE_SECONDS)
    for number in range(body["max_tokens"]):
        await asyncio.sleep(TOKEN_SECONDS)
        if mode == "loses" and number == 2:
            return
        token = zlib.crc32(f"{body['prompt']}/{number}/{mode if mode == 'errs' else ''}".encode())
        for _ in range(2 if mode == "repeats" and number == 1 else 1):
            yield choice(text=f" {token}", token_ids=[token])
    yield choice(text="", finish_reason="length")
    yield json.dumps({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}).encode()
    yield b"[DONE]"


def choice(**fields):
    return json.dumps({"choices": [fields]}).encode()


uvicorn.run(application, port=PORT, log_level="error")
