"""What the hub says about a repository, asked of a real server on this machine."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from privzoo.errors import first_line
from privzoo.hub import why_not_to_be_had

CODES = {"gated": (401, "GatedRepo"), "missing": (404, "RepoNotFound"), "broken": (500, "")}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.split("/")[-1]
        status, code = CODES.get(name, (200, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(f'{{"id": "some/{name}", "siblings": []}}'.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def a_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield
        server.shutdown()


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize(
    ("name", "reason"), [("gated", "hf auth login"), ("missing", "no such {kind}, or a private one"), ("broken", "500")]
)
def test_the_reason_is_told(a_hub: None, kind, name, reason) -> None:
    assert reason.format(kind=kind) in (why_not_to_be_had(f"some/{name}", kind) or "")


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_nothing_is_said_of_what_is_there(a_hub: None, kind) -> None:
    assert why_not_to_be_had("some/thing", kind) is None


@pytest.mark.parametrize(("text", "line"), [("", "no details"), ("\n \n one. \ntwo", "one"), ("x" * 300, "x" * 200)])
def test_an_error_in_one_line(text, line) -> None:
    assert first_line(ValueError(text)) == line
