"""Keys, limits, errors, counts, and clients that are gone."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_toys import (
    ANSWER,
    QUESTION,
    ROLES,
    TOKENIZER,
    babbler,
    calculator,
    serving,
    wait_until,
)

from toolmem.errors import ToolmemError
from toolmem.serving import Limits
from toolmem.serving.app import LOOPBACK

HTTP = httpx.Client(timeout=60)  # a busy machine is no failure
ASK = {"messages": [{"role": "user", "content": QUESTION}]}
CHAT = "/v1/chat/completions"


def idle(engine) -> bool:
    stats = engine.stats()
    return not (stats.lanes_running or stats.lanes_waiting or stats.lanes_calling)


@pytest.fixture
def busy(engine):
    """A server with one lane, room for one that waits, and a model that writes for seconds."""
    one = engine(babbler(max_seq_len=20000), TOKENIZER, max_lanes=1, max_queued=1)
    with serving(one, limits=Limits(max_tokens=19000)) as served:
        yield served


def error_of(response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_errors_have_openais_shape(in_tool):
    address, _ = in_tool
    with httpx.Client(base_url=address, timeout=60) as http:
        missing = http.get("/v2/nothing")
        assert missing.status_code == 404 and "/v2/nothing" in error_of(missing)["message"]
        wrong = http.get(CHAT)
        assert wrong.status_code == 405 and error_of(wrong) and wrong.headers["allow"] == "POST"
        text = http.post(CHAT, content=json.dumps(ASK), headers={"content-type": "text/plain"})
        assert text.status_code == 415 and error_of(text)
        broken = http.post(CHAT, content=b"{", headers={"content-type": "application/json"})
        assert broken.status_code == 400 and "JSON" in error_of(broken)["message"]
        other = http.post(CHAT, json={**ASK, "model": "gpt-9"})
        assert other.status_code == 404 and error_of(other)["code"] == "model_not_found"
        odd = http.post(
            CHAT,
            content=b'{"messages": [{"role": "\\ud800"}]}',
            headers={"content-type": "application/json"},
        )
        assert odd.status_code == 400 and error_of(odd)["param"] == "messages[0].role"
        long = http.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 400}]})
        assert long.status_code == 400
        assert error_of(long)["code"] == "context_length_exceeded"
        half = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}'
        good = http.post(CHAT, content=half, headers={"content-type": "application/json"})
        assert good.status_code == 200


def test_a_body_that_is_too_long(engine):
    served = engine(babbler(), TOKENIZER)
    with serving(served, limits=Limits(max_body_bytes=1000)) as (address, _):
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]}).encode()
        kind = {"content-type": "application/json"}
        told = HTTP.post(address + CHAT, content=body, headers=kind)
        assert told.status_code == 413 and error_of(told)["code"] == "request_too_large"
        # in pieces, with no length told
        pieces = (body[i : i + 100] for i in range(0, len(body), 100))
        assert HTTP.post(address + CHAT, content=pieces, headers=kind).status_code == 413
        assert idle(served)


def test_the_key(engine):
    with serving(engine(babbler(), TOKENIZER), api_key="secret") as (address, _):  # noqa: SIM117
        with httpx.Client(base_url=address, timeout=60) as http:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                for path in ("/v1/models", "/metrics", "/nothing"):
                    refused = http.get(path, headers=headers)
                    assert (
                        refused.status_code == 401
                        and error_of(refused)["code"] == "invalid_api_key"
                    )
                    assert refused.headers["www-authenticate"] == "Bearer"
                assert http.post(CHAT, json=ASK, headers=headers).status_code == 401
            assert http.get("/health").status_code == http.get("/").status_code == 200
            right = {"authorization": "Bearer secret"}
            assert http.get("/v1/models", headers=right).status_code == 200
            assert http.post(CHAT, json={**ASK, "max_tokens": 1}, headers=right).status_code == 200
            odd = {"authorization": "Bearer é".encode("latin-1")}
            assert http.get("/v1/models", headers=odd).status_code == 401


def test_another_sites_name_for_this_machine(engine):
    """A page whose name was pointed at 127.0.0.1 after it was loaded gets nothing."""
    served = engine(babbler(), TOKENIZER)
    with serving(served, hosts=LOOPBACK) as (address, _):  # noqa: SIM117
        with httpx.Client(base_url=address, timeout=60) as http:
            assert http.get("/v1/models", headers={"host": "evil.example:80"}).status_code == 403
            for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
                assert http.get("/v1/models", headers={"host": host}).status_code == 200
            assert http.get("/v1/models").status_code == 200


def test_too_many_at_once(busy):
    """What does not fit is told to come back; what was begun of it is given back."""
    address, service = busy

    async def until(waiting: int, running: int = 1) -> None:
        def there() -> bool:
            stats = service.engine.stats()
            return (stats.lanes_waiting, stats.lanes_running) == (waiting, running)

        await asyncio.to_thread(wait_until, there)

    async def crowd():
        long = {**ASK, "max_tokens": 19000}
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            first = asyncio.create_task(http.post(CHAT, json=long))
            await until(waiting=0)
            two = await http.post(CHAT, json={**long, "n": 2})
            await until(waiting=0)  # the half that was taken is given back
            second = asyncio.create_task(http.post(CHAT, json=long))
            await until(waiting=1)
            third = await http.post(CHAT, json=ASK)
            streamed = await http.post(CHAT, json={**ASK, "stream": True})
            for task in (first, second):
                task.cancel()
            return two, third, streamed

    two, third, streamed = asyncio.run(crowd())
    for response in (two, third, streamed):
        assert response.status_code == 429
        error = error_of(response)
        assert error["code"] == "engine_full" and error["type"] == "rate_limit_error"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    wait_until(lambda: idle(service.engine))


def metrics_of(address) -> dict[tuple[str, tuple], float]:
    response = HTTP.get(address + "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics(in_tool):
    address, service = in_tool
    before = metrics_of(address)
    for stream in (False, True):
        assert HTTP.post(address + CHAT, json={**ASK, "stream": stream}).status_code == 200
    assert HTTP.post(address + CHAT, json={}).status_code == 400
    wait_until(lambda: metrics_of(address)[("toolmem_completions_open", ())] == 0)
    after = metrics_of(address)
    stats = service.engine.stats()
    for state in ("running", "waiting", "calling"):
        assert after[("toolmem_lanes", (("state", state),))] == 0
    assert after[("toolmem_pages", (("state", "used"),))] == stats.pages_used
    assert after[("toolmem_pages", (("state", "free"),))] == stats.pages_free > 0
    assert after[("toolmem_tokens_total", (("kind", "sampled"),))] == stats.tokens_sampled > 40
    assert after[("toolmem_tokens_total", (("kind", "forced"),))] == stats.tokens_forced > 0
    assert after[("toolmem_tool_calls_total", ())] == 2
    assert after[("toolmem_tool_errors_total", ())] == 0
    assert after[("toolmem_dialogues_total", (("outcome", "finished"),))] == 2
    assert after[("toolmem_completion_seconds_count", ())] == 2
    assert after[("toolmem_first_token_seconds_count", ())] == 2
    assert (
        0
        < after[("toolmem_first_token_seconds_sum", ())]
        <= after[("toolmem_completion_seconds_sum", ())]
    )
    requests = "toolmem_http_requests_total"
    assert after[(requests, (("path", CHAT), ("status", "200")))] == 2
    assert after[(requests, (("path", CHAT), ("status", "400")))] == 1
    assert not any(name == requests for name, _ in before) or before.keys() <= after.keys()


def test_health(in_tool):
    assert HTTP.get(in_tool[0] + "/health").json() == {"status": "ok", "model": "toy"}


def raw(address: str, body: dict, tail: bytes = b"") -> socket.socket:
    """A connection that has sent its request, by hand."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data + tail)
    return connection


def slam(connection: socket.socket) -> None:
    """Close with a reset, as a process that was killed does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leave", [socket.socket.close, slam])
@pytest.mark.parametrize("running", [True, False], ids=["running", "waiting"])
def test_a_client_that_vanishes_gives_its_lane_back(busy, stream, leave, running):
    address, service = busy
    body = {**ASK, "max_tokens": 19000, "stream": stream}
    connections = [raw(address, body)]
    wait_until(lambda: service.engine.stats().lanes_running == 1)
    if not running:
        connections.append(raw(address, body))
        wait_until(lambda: service.engine.stats().lanes_waiting == 1)
    if stream and running:
        assert b"200 OK" in connections[-1].recv(4096)
    leave(connections[-1])
    if running:
        wait_until(lambda: idle(service.engine))
    else:
        wait_until(lambda: not service.engine.stats().lanes_waiting)
        assert service.engine.stats().lanes_running == 1  # the other one goes on
        leave(connections[0])
        wait_until(lambda: idle(service.engine))
    stats = service.engine.stats()
    assert stats.requests_cancelled == len(connections)
    assert stats.tokens_sampled < 19000 * len(connections)


def test_a_client_that_vanishes_before_its_body_is_whole(in_tool):
    address, service = in_tool
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
        )
        connection.sendall(b"content-length: 500\r\n\r\n{")
        time.sleep(0.1)
    reply = HTTP.post(address + CHAT, json=ASK)
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER
    assert service.engine.stats().requests_finished == 1


def test_a_step_that_fails_is_a_500_and_the_server_goes_on(in_tool, monkeypatch, caplog):
    address, service = in_tool

    def fails(*args, **options):
        raise RuntimeError("out of paper")

    with monkeypatch.context() as patch:
        patch.setattr(service.engine.scheduler, "step", fails)
        whole = HTTP.post(address + CHAT, json=ASK)
        streamed = HTTP.post(address + CHAT, json={**ASK, "stream": True})
    assert whole.status_code == 500 and "paper" not in error_of(whole)["message"]
    events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-2])["error"]["type"] == "server_error" and events[-1] == "[DONE]"
    assert caplog.text.count("RuntimeError: out of paper") >= 1
    wait_until(lambda: idle(service.engine))
    reply = HTTP.post(address + CHAT, json=ASK)
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER


def test_a_dialogue_that_fails_by_itself_is_a_500_too(in_tool, monkeypatch, caplog):
    """Asking again would not help, so it is no 503; whoever else is served goes on."""
    address, service = in_tool

    def fails(lane):
        raise ToolmemError("a query that cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(service.engine.scheduler.lanes, "call_text", fails)
        whole = HTTP.post(address + CHAT, json=ASK)
    assert whole.status_code == 500 and "cannot be read" not in error_of(whole)["message"]
    assert "a query that cannot be read" in caplog.text
    assert service.engine.stats().requests_failed == 1
    wait_until(lambda: idle(service.engine))
    reply = HTTP.post(address + CHAT, json=ASK)
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER


def test_every_way_of_choosing_tokens_is_survived(engine):
    """No bounds of the options bring a step to its end: one request never harms another."""
    served = engine(babbler(), TOKENIZER)
    extremes = [
        {"temperature": 1e-30}, {"temperature": 0.001}, {"temperature": 100},
        {"top_p": 1e-12, "temperature": 1},
        {"min_p": 1, "temperature": 1}, {"top_k": 1, "temperature": 100}, {"frequency_penalty": -2, "n": 4},
        {"repetition_penalty": 10, "temperature": 0.001}, {"repetition_penalty": 0.1, "temperature": 0.001},
        {"presence_penalty": 2, "frequency_penalty": 2, "temperature": 0.001}, {"seed": -(2**63), "n": 16},
        {"logit_bias": {str(i): -100 for i in range(260)}}, {"logit_bias": {"0": 100}, "temperature": 0.001},
        {"tool_choice": "none", "logit_bias": {str(ROLES["database"]): 100}}, {"stop": ["\x00", "é"]},
        {"seed": 2**63 - 1, "n": 16, "temperature": 1},
    ]  # fmt: skip
    with serving(served) as (address, _), httpx.Client(base_url=address, timeout=60) as http:
        for options in extremes:
            reply = http.post(
                CHAT,
                content=json.dumps({**ASK, "max_tokens": 20, **options}),
                headers={"content-type": "application/json"},
            )
            assert reply.status_code == 200, (options, reply.text)
            assert len(reply.json()["choices"]) == options.get("n", 1)
        assert served.stats().requests_finished == sum(o.get("n", 1) for o in extremes)


def test_a_stopping_server_ends_its_answers(engine):
    """Who is still reading when the engine is closed is told so, in the stream and without one."""
    one = engine(babbler(max_seq_len=20000), TOKENIZER)
    with serving(one, limits=Limits(max_tokens=19000)) as (address, service):
        body = {**ASK, "max_tokens": 19000}
        connections = [raw(address, {**body, "stream": stream}) for stream in (True, False)]
        wait_until(lambda: service.engine.stats().lanes_running == 2)
        one.close()
        texts = []
        for connection in connections:
            connection.settimeout(60)
            text = b""
            while b"error" not in text:
                part = connection.recv(1 << 16)
                assert part
                text += part
            texts.append(text)
            connection.close()
        assert b"200 OK" in texts[0] and b'"type": "server_error"' in texts[0]
        assert b"503 " in texts[1]


@pytest.mark.slow
def test_five_hundred_clients_that_vanish(engine):
    """At every moment of an answer; what is left behind is nothing, and those that stay are served."""
    toolbox = calculator()
    served = engine(babbler(calls=True), TOKENIZER, toolbox, max_lanes=32, max_queued=1000)
    clean = served.stats()
    with serving(served, toolbox=toolbox, limits=Limits(max_tokens=64)) as (address, _):
        host, port = address.removeprefix("http://").split(":")

        async def client(number: int) -> str:
            body = json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"question {number} " + "x" * (number % 60)}
                    ],
                    "stream": number % 2 == 0,
                    "max_tokens": 8 + number % 56,
                    "n": 1 + number % 3 // 2,
                    "temperature": 1.0,
                    "seed": number,
                }
            ).encode()
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            head += f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            stays = number % 5 == 0
            if number % 5 == 1:  # in the middle of its own request
                writer.write(head.encode() + body[:-3])
                await writer.drain()
            else:
                writer.write(head.encode() + body)
                await writer.drain()
                if number % 5 == 2:  # after some of the answer
                    await reader.read(1 + number)
                elif number % 5 == 3:  # after a while
                    await asyncio.sleep(number % 50 / 50)
                elif stays:
                    answer = await reader.read()
                    writer.close()
                    return (
                        "served"
                        if b" 200 OK" in answer and b'"finish_reason": "' in answer
                        else "failed"
                    )
            if number % 2:
                writer.transport.abort()
            writer.close()
            return "gone"

        async def crowd() -> list[str]:
            return await asyncio.gather(*(client(number) for number in range(500)))

        outcomes = asyncio.run(crowd())
        assert outcomes.count("served") == 100 and outcomes.count("gone") == 400
        wait_until(lambda: idle(served), 60)
        wait_until(lambda: metrics_of(address)[("toolmem_completions_open", ())] == 0, 60)
        stats = served.stats()
        begun = stats.requests_finished + stats.requests_cancelled
        assert 100 <= begun <= 700 and stats.requests_cancelled > 50
        assert stats.bytes_used <= stats.bytes_peak
        # Beginnings that are kept to be shared are all that may be left, and they can be let go.
        served.update_weights()
        left = served.stats()
        assert (left.pages_used, left.bytes_used) == (clean.pages_used, clean.bytes_used)
        assert HTTP.post(address + CHAT, json={**ASK, "max_tokens": 3}).status_code == 200
    toolbox.close()
