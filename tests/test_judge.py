"""`python -m privzoo.judge` against a real HTTP server that speaks the protocol, and the chart of its grades."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow import MlflowClient

from privzoo.errors import UserError
from privzoo.judge import judge
from privzoo.reporting.grades import chart


class Handler(BaseHTTPRequestHandler):
    """Grades an answer 5 if it is the reference, else 1; what `server.plan` says comes first."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        code = self.server.plan.pop(0) if self.server.plan else 200
        if code == 0:  # ends the connection without a word
            return
        text = body["messages"][0]["content"]
        reference, answer = (text.split(f"{name}:\n")[-1].split("\n")[0] for name in ("Reference", "Answer"))
        grade = 5 if reference == answer else 1
        reply = "I cannot say." if code == 204 else f'Here: {{"correctness": {grade}, "similarity": {grade}}}'
        content = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(200 if code == 204 else code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.plan = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, privzoo):
    """A run that has learned the one answer there is, and one that has not."""
    folder = tmp_path_factory.mktemp("judge")
    rows = [{"q": f"name : {i}", "a": "Quill serves bread ."} for i in range(200)]
    (folder / "own.json").write_text(json.dumps(rows))
    for budget in (["eps=inf", "epochs=4", "lr=3e-3"], ["eps=1", "epochs=0.3", "lr=1e-6"]):
        code, output = privzoo(
            "task=jsonl", "method=dp_full", "model=tiny_lm", *budget, f"data.path={folder}/own.json",
            "task.data.columns={prompt: q, response: a}", "task.max_length=48", "batch_size=50",
            "trainer.accelerator=cpu", f"output_dir={folder}/runs",
        )  # fmt: skip
        assert code == 0, output
    made = {run.name.split("-")[2]: run for run in (folder / "runs").iterdir()}
    return made["epsinf"], made["eps1"]


def test_grades_by_an_endpoint(runs, server, privzoo, monkeypatch):
    good, bad = runs
    code, output = privzoo(
        f"run={good}", f"endpoint={server.url}", "model=judge-1", "count=5", "max_new_tokens=8", module="privzoo.judge",
    )  # fmt: skip
    assert code == 0, output
    assert "5 answers graded by judge-1, 0 without a grade" in output
    path, _, body = server.seen[0]
    assert (path, body["model"], body["temperature"]) == ("/v1/chat/completions", "judge-1", 0)
    content = json.loads((good / "judge.json").read_text())
    assert (content["correctness"], content["similarity"], len(content["rows"])) == (5.0, 5.0, 5)
    assert json.loads((good / "result.json").read_text())["metric/judge_correctness"] == 5.0
    monkeypatch.setenv("MY_KEY", "secret")
    found = judge(str(bad), "judge-1", server.url, "MY_KEY", count=4, max_new_tokens=8)
    assert found["correctness"] == 1.0
    assert server.seen[-1][1] == "Bearer secret"
    assert "secret" not in (bad / "judge.json").read_text()


def test_a_busy_judge_is_asked_again(runs, server, monkeypatch):
    monkeypatch.setattr("privzoo.judge.time.sleep", lambda seconds: None)
    server.plan = [429, 503]
    assert judge(str(runs[0]), "j", server.url, count=2, max_new_tokens=8)["graded"] == 2
    assert len(server.seen) == 4
    server.plan = [200, 401]
    with pytest.raises(UserError, match="HTTP 401"):
        judge(str(runs[0]), "j", server.url, count=3, max_new_tokens=8)
    assert len(json.loads((runs[0] / "judge.json").read_text())["rows"]) == 1, "what was graded is kept"


def test_means_go_to_mlflow_and_rows_do_not(runs, server, privzoo, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the test's own client
    good, _ = runs
    code, output = privzoo(
        f"run={good}", f"endpoint={server.url}", "model=judge-1", "count=3", "max_new_tokens=8",
        "mlflow=true", module="privzoo.judge",
    )  # fmt: skip
    assert code == 0, output
    client = MlflowClient(tracking_uri=(good / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("privzoo").experiment_id])
    assert found.info.run_name == good.name
    record = json.loads((good / "result.json").read_text())
    assert found.data.metrics["result/metric/judge_correctness"] == record["metric/judge_correctness"]
    assert found.data.params["task.name"] == "jsonl"
    kept = [path.read_text() for path in (good / "mlruns").rglob("*") if path.is_file()]
    assert kept
    assert not any("Quill" in text for text in kept)


def test_a_reply_without_grades_is_counted(runs, server):
    server.plan = [204]
    found = judge(str(runs[0]), "j", server.url, count=3, max_new_tokens=8)
    assert (found["graded"], found["without_a_grade"], found["correctness"]) == (2, 1, 5.0)
    assert found["rows"][0]["reply"] == "I cannot say."


def test_a_judge_elsewhere_wants_leave(runs, monkeypatch):
    with pytest.raises(UserError, match="add send=true if they may"):
        judge(str(runs[0]), "j", "https://api.example.com/v1")
    with pytest.raises(UserError, match="to begin with http://"):
        judge(str(runs[0]), "j", "localhost:8000/v1", send=True)
    waits: list[float] = []
    monkeypatch.setattr("privzoo.judge.time.sleep", waits.append)
    with pytest.raises(UserError, match="gave no answer"):
        judge(str(runs[0]), "j", "http://localhost:9/v1/x?", count=1, max_new_tokens=8)
    assert not waits, "nobody is there who could come back"


def test_a_judge_that_goes_away_is_waited_for(runs, server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("privzoo.judge.time.sleep", waits.append)
    server.plan = [200, 0]
    found = judge(str(runs[0]), "j", server.url, count=3, max_new_tokens=8)
    assert (found["graded"], waits) == (3, [2.0])


def test_a_judge_here_is_not_asked_through_a_proxy(runs, server, monkeypatch):
    """The proxy is another machine, to which no row may go without leave."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert judge(str(runs[0]), "j", server.url, count=1, max_new_tokens=8)["graded"] == 1


def test_a_judge_that_runs_here(runs):
    """The tiny model says no grades, which is told; an earlier judge's do not stay in the record."""
    record = json.loads((runs[0] / "result.json").read_text())
    (runs[0] / "result.json").write_text(json.dumps({**record, "metric/judge_correctness": 4.0}))
    found = judge(str(runs[0]), "tiny_lm", count=1, max_new_tokens=8)
    assert (found["graded"], found["without_a_grade"]) == (0, 1)
    assert json.loads((runs[0] / "result.json").read_text()).get("metric/judge_correctness") is None


def test_a_chart_of_grades(runs, server, tmp_path):
    for run in runs:
        judge(str(run), "j", server.url, count=5, max_new_tokens=8)
    out = chart([str(run) for run in runs], str(tmp_path / "grades.png"))
    assert out.read_bytes().startswith(b"\x89PNG")
    (runs[0] / "judge.json").unlink()
    with pytest.raises(UserError, match=r"has no judge\.json"):
        chart([str(runs[0])], str(tmp_path / "other.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=x", "count=0"], "count=0"),
        (["model=x", "count=many"], "count=many to be a whole number"),
        (["model=x", "send=yes"], "send=yes to be true or false"),
        ([], "Expected model="),
        (["modl=x"], "did you mean 'model'"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_mistakes_are_one_sentence(arguments, message, runs, privzoo):
    code, output = privzoo(f"run={runs[0]}", *arguments, module="privzoo.judge")
    assert code == 2
    assert message in output
