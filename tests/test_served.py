"""Completions of a server, here a stub that speaks OpenAI's completions protocol."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dpo_mini.served import ServerError, served_completions


@pytest.fixture
def server():
    """A stub at `url` that notes what it is asked, and gives `choices`."""

    class Stub(BaseHTTPRequestHandler):
        asked, choices, status = [], [], 200

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            Stub.asked.append((self.path, json.loads(body)))
            self.send_response(Stub.status)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": Stub.choices}).encode())

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    Stub.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield Stub
    http.shutdown()
    http.server_close()


def test_ids_go_out_and_eos_comes_back_exactly_where_the_sample_ended(server, tokenizer):
    server.choices = [
        {"text": " is good", "finish_reason": "stop"},
        {"text": " is", "finish_reason": "length"},
        {"text": " x", "finish_reason": "length", "token_ids": [7, 8]},
    ]
    (ended, cut, given), *_ = served_completions(
        server.url, "m", tokenizer, ["This movie", "It"], n=3, max_new_tokens=5, seed=4
    )
    eos = tokenizer.eos_token_id
    assert ended.ids[-1] == eos and ended.ids.count(eos) == 1 and eos not in cut.ids
    assert tokenizer.decode(ended.ids[:-1]) == " is good" and given.ids == [7, 8]
    path, body = server.asked[0]
    assert path == "/v1/completions" and body["prompt"] == tokenizer("This movie")["input_ids"]
    assert ended.prompt_ids == body["prompt"] and body["n"] == 3 and body["max_tokens"] == 5
    assert (body["top_p"], body["top_k"], body["temperature"]) == (1.0, -1, 1.0)
    assert [asked["seed"] for _, asked in server.asked] == [4, 5]


@pytest.mark.parametrize(
    "choices, said",
    [
        ([], "expected 1 choices"),
        ([{"text": "a", "finish_reason": "content_filter"}], "expected a text, and 'stop'"),
        ([{"finish_reason": "stop"}], "expected a text"),
    ],
)
def test_an_answer_that_is_none_is_refused(server, tokenizer, choices, said):
    server.choices = choices
    with pytest.raises(ServerError, match=said):
        served_completions(server.url, "m", tokenizer, ["It"])


def test_a_server_that_refuses_or_is_not_there_is_told_in_a_sentence(server, tokenizer):
    server.status = 404
    with pytest.raises(ServerError, match="refused the request .404."):
        served_completions(server.url, "m", tokenizer, ["It"])
    with pytest.raises(ServerError, match="cannot be asked.*running"):
        served_completions("http://127.0.0.1:9/v1", "m", tokenizer, ["It"])
    with pytest.raises(ServerError, match="empty/completions cannot be asked"):
        served_completions("empty", "m", tokenizer, ["It"])
