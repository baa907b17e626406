"""A server's metrics, looked at again and again, from a server of the test's own."""

import threading
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import dspark_lab as lab
from dspark_lab.explore import AcceptanceWatch

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def counters(rounds: int, passed: list[int]) -> str:
    """vLLM's counters after so many rounds of two slots."""
    values = (rounds, rounds * len(passed), sum(passed))
    label = 'engine="0",model_name="m"'
    lines = [
        f"vllm:spec_decode_{n}_total{{{label}}} {v}.0" for n, v in zip(NAMES, values, strict=True)
    ]
    for slot, count in enumerate(passed):
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        lines.append(f'{name}{{{label},position="{slot}"}} {count}.0')
    return "\n".join(lines) + "\n"


class Server:
    """Answers with ``text``, or with an error where it is None; counts what it was asked."""

    def __init__(self) -> None:
        self.text: str | None = counters(100, [80, 60])
        self.asked = threading.Semaphore(0)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if server.text is not None else 503)
                self.end_headers()
                self.wfile.write((server.text or "").encode())
                server.asked.release()

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/metrics"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_each_look_is_of_the_rounds_since_the_last_one(server: Server):
    watch = AcceptanceWatch(server.address, 1.0)
    assert "image/png" not in watch._repr_mimebundle_() and repr(watch).startswith("watch_accept")
    watch.look()
    assert watch.table.empty and "100 rounds before the first look" in watch._line.value
    server.text = counters(150, [100, 70])
    watch.look()
    watch.look()
    server.text = counters(250, [200, 160])
    watch.look()
    table = watch.table
    assert table["rounds"].tolist() == [50, 100]
    assert table["tau"].tolist() == [1 + 30 / 50, 1 + 190 / 100]
    assert table["survival"].tolist() == [[20 / 50, 10 / 50], [1.0, 0.9]]
    assert table["seconds"].is_monotonic_increasing
    assert watch._line.value == "tau 2.90 over 100 rounds"
    picture = b64decode(watch._repr_mimebundle_()["image/png"])
    assert picture.startswith(b"\x89PNG")


def test_a_server_that_began_anew_counts_from_nothing_and_one_that_fails_is_asked_again(
    server: Server,
):
    watch = AcceptanceWatch(server.address, 1.0)
    watch.look()
    server.text = None
    watch.look()
    assert "no answer" in watch._line.value and watch.table.empty
    server.text = counters(40, [30, 10])
    watch.look()
    assert watch.table["tau"].tolist() == [2.0]


def test_it_looks_by_itself_until_it_is_stopped(server: Server):
    watch = lab.watch_acceptance(server.address, every=0.01)
    for _ in range(4):
        assert server.asked.acquire(timeout=60)
    [thread] = [one for one in threading.enumerate() if getattr(one, "_target", None) == watch.run]
    watch.stop()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_an_address_without_counters_is_refused_at_once(server: Server):
    server.text = "python_gc_objects_collected_total 1.0\n"
    with pytest.raises(ValueError, match="must hold a record of acceptance"):
        lab.watch_acceptance(server.address)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(OSError, match=rf"{server.address} gave no answer: .*refused"):
        lab.watch_acceptance(server.address)


def test_intervals_of_sglang_are_the_servers_own(server: Server):
    watch = AcceptanceWatch(server.address, 1.0)
    for length in (2.5, 3.0):
        server.text = f'sglang:spec_accept_length{{tp_rank="0"}} {length}\n'
        watch.look()
    assert watch.table["tau"].tolist() == [2.5, 3.0]
    assert watch.table["survival"].tolist() == [[], []]
