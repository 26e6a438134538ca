"""A stand-in for an engine, for faults that a real one does not show on demand.

Speaks the few routes that `launch`, `ps` and `check` use, and misbehaves as its
arguments say. Run as a script; imports nothing of fp8ctl. `code_engine.py` runs it
with real workers.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import signal
import subprocess
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--delay", type=float, default=0.0, help="seconds before it listens")
parser.add_argument("--crash", help="text to print before exit 3, instead of listening")
parser.add_argument("--die-after", type=float, help="seconds after which it exits 4")
parser.add_argument("--die-when-asked", action="store_true", help="exit 4 at a first question")
parser.add_argument("--deaf", action="store_true", help="ignore SIGTERM")
parser.add_argument("--flood", type=int, default=0, help="MiB of log before it listens")
parser.add_argument("--child", action="store_true", help="leave a child in a session of its own")
parser.add_argument("--state", default="ready", help="the gate's state; none: a stock server")
parser.add_argument("--answer", default="The capital of France is Paris.")
parser.add_argument("--nan", action="store_true", help="log-probabilities are null")
parser.add_argument("--moody", action="store_true", help="every completion is another one")
parser.add_argument("--torn", type=float, help="one of two tokens, so many nats apart, in turn")
parser.add_argument("--mute", action="store_true", help="/get_server_info never answers")
parser.add_argument("--quantization")
parser.add_argument("--model-path", default="/nowhere")
parser.add_argument("--key", help="name of the variable with the API key to ask for")
parser.add_argument("--workers", type=int, help="how many may be asked for their code")
parser.add_argument("--about", default="{}", help="JSON that the state tells besides")
parser.add_argument("--tell-key", help="a key among the arguments, as SGLang tells it")
parser.add_argument("--no-template", action="store_true", help="the model cannot chat")
parser.add_argument("--bare", action="store_true", help="no answer has log-probabilities")
parser.add_argument("--turn", help="a file: once it is there, what stands in it is the state")
asked = parser.parse_args()
completions = 0


def state() -> str:
    if asked.turn and os.path.exists(asked.turn):
        with open(asked.turn) as file:
            return file.read().strip()
    return str(asked.state)


if asked.deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if asked.child:
    # In a session of its own, orphaned at once, deaf: only its environment says whose it is.
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"
    middle = (
        "import subprocess, sys; "
        f"subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True)"
    )
    subprocess.run([sys.executable, "-c", middle], check=True)
if asked.flood:
    line = b"x" * 1023 + b"\n"
    for _ in range(asked.flood):
        sys.stdout.buffer.write(line * 1024)
sys.stdout.write("loading\n")
sys.stdout.flush()
time.sleep(asked.delay)
if asked.crash:
    sys.stderr.write(asked.crash + "\n")
    sys.exit(3)


class Handler(http.server.BaseHTTPRequestHandler):
    def send(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        wanted = os.environ.get(asked.key, "?") if asked.key else None
        return wanted is None or self.headers.get("Authorization") == f"Bearer {wanted}"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.send(200, {})
        elif not self.allowed():
            self.send(401, {"error": "Unauthorized"})
        elif self.path == "/fp8ctl/state" and asked.state != "none":
            about = {"state": state(), "engine": "fake", "message": "", "pid": os.getpid()}
            self.send(200, {**about, **json.loads(asked.about)})
        elif self.path == "/fp8ctl/code" and asked.workers is not None:
            loaded = sys.modules["fp8ctl.engines.hooks.loaded"]
            self.send(200, loaded.everyone(asked.workers))
        elif self.path == "/v1/models":
            self.send(200, {"data": [{"id": "tiny"}]})
        elif self.path == "/get_server_info" and asked.mute:
            time.sleep(60)
        elif self.path == "/get_server_info":
            info = {"quantization": asked.quantization, "model_path": asked.model_path}
            info |= {"api_key": asked.tell_key} if asked.tell_key else {}
            self.send(200, {**info, "json_model_override_args": "{}", "version": "0.4.8"})
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        global completions
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if asked.die_when_asked:
            sys.stderr.write("MemoryError\n")
            os._exit(4)
        if not self.allowed():
            self.send(401, {"error": "Unauthorized"})
        elif state() in {"unpushed", "updating", "failed"}:
            self.send(503, {"error": {"id": "FP8-GATE", "state": state()}})
        elif self.path == "/v1/chat/completions" and asked.no_template:
            self.send(400, {"message": "this model has no chat template"})
        elif self.path == "/v1/chat/completions":
            value = None if asked.nan else -0.25
            tokens = {"content": [{"token": "Paris", "logprob": value}]}
            choice: dict[str, object] = {"message": {"content": asked.answer}, "logprobs": tokens}
            self.send(200, {"choices": [choice]})
        else:
            completions += 1
            mood = str(completions) if asked.moody else ""
            if asked.torn is not None:
                mood = (" a", " b")[completions % 2]
            choice = {"text": asked.answer + mood}
            if json.loads(body or b"{}").get("logprobs") and not asked.bare:
                told: dict[str, object] = {"token_logprobs": [None if asked.nan else -0.5, -1.5]}
                if asked.torn is not None:
                    last = {" a": -1.5, " b": -1.5 - asked.torn}
                    told["tokens"] = [asked.answer, mood]
                    told["top_logprobs"] = [{asked.answer: -0.5}, last]
                choice["logprobs"] = told
            self.send(200, {"choices": [choice]})

    def log_message(self, *arguments: object) -> None:
        pass


server = http.server.ThreadingHTTPServer((asked.host, asked.port), Handler)
sys.stdout.write("listening\n")
sys.stdout.flush()
if asked.die_after is not None:
    import threading

    def die() -> None:
        sys.stderr.write("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n")
        sys.stderr.flush()
        os._exit(4)

    threading.Timer(asked.die_after, die).start()
server.serve_forever()
