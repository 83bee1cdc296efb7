"""Notifications against servers of this machine: a webhook, and a mail server with and without encryption."""

import email
import email.policy
import json
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from visrec_nb.core.errors import ParameterError, ReportError
from visrec_nb.core.files import write_json
from visrec_nb.reports.notify import message, notify, post_webhook, send_mail, try_notify

PATH = "/services/T0/hush-hush-token"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "photos" / "2026-11-23T020000Z-abcdef"
    write_json(folder / "manifest.json", {
        "report": "image_training", "run": "photos", "status": "ok", "error": None, "started": "2026-11-23T02:00:00Z", "seconds": 612.0,
        "conclusion": "Of 372 photos it named 86\N{NO-BREAK SPACE}% correctly – größer.", "key": "ab"})
    write_json(folder / "metrics.json", {"accuracy": 0.86})
    return folder


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try: yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# A webhook


@contextmanager
def hook(*answers):
    "A webhook; what it got is in `.got`."

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.got.append((self.path, self.headers["Content-Type"], json.loads(body)))
            status = self.server.answers.pop(0) if self.server.answers else 200
            self.send_response(status)
            if status in (301, 302, 307): self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self): self.server.got.append((self.path, "GET", None))
        def log_message(self, *args): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.got, server.answers = [], list(answers)
    with serving(server):
        server.url = f"http://127.0.0.1:{server.server_port}{PATH}"
        yield server


def test_a_hook_gets_the_conclusion(run, tmp_path, monkeypatch):
    (tmp_path / "runs" / "alerts.yaml").write_text("- accuracy < 0.9\n- accuracy > 0.9\n")
    with hook() as server:
        monkeypatch.setenv("HOOK", server.url)
        assert notify(run, "env:HOOK", link="https://reports.example.org/")
        (tmp_path / "hook").write_text(server.url + "\n")
        assert notify(run, f"file:{tmp_path / 'hook'}", alerts=[])
    (path, kind, first), (_, _, second) = server.got
    assert path == PATH and kind == "application/json; charset=utf-8"
    assert first["text"].splitlines() == [
        "photos: 1 alert (2026-11-23 02:00 UTC, took 10 min 12 s)", "Of 372 photos it named 86 % correctly – größer.",
        "- accuracy is 86.0 %, below 90.0 %",
        "https://reports.example.org/photos/2026-11-23T020000Z-abcdef/index.html"]
    assert second["text"].startswith("photos: ok") and second["alerts"] == [] and second["status"] == "ok"


@pytest.mark.parametrize(("answers", "tries", "why"), [
    ((500, 503, 200), 3, None), ((429, 204), 2, None), ((500, 500, 500), 3, "answered 500"), ((404,), 1, "answered 404"),
    ((400,), 1, "answered 400"), ((302,), 1, "answered 302"), ((307,), 1, "answered 307"),
])
def test_only_what_may_pass_is_tried_again_and_nobody_is_sent_elsewhere(run, answers, tries, why):
    waited: list[float] = []
    with hook(*answers) as server:
        if why is None: post_webhook(server.url, message(run), wait=waited.append)
        else:
            with pytest.raises(ReportError) as e: post_webhook(server.url, message(run), wait=waited.append)
            assert str(e.value) == f"the webhook {why}"
    assert [path for path, *_ in server.got] == [PATH] * tries and waited == [2.0, 4.0][:tries - 1]


def test_a_hook_that_never_answers(run):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}{PATH}"
        with pytest.raises(ReportError, match="did not answer in time"): post_webhook(url, message(run), timeout=0.1, wait=lambda _: None)


def test_a_hook_that_talks_nonsense(run):
    class Nonsense(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(b"no HTTP at all\r\n\r\n")

    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Nonsense)) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}{PATH}"
        with pytest.raises(ReportError) as e: post_webhook(url, message(run), tries=1)
    assert PATH not in str(e.value) and "could not be reached" in str(e.value)


@pytest.mark.parametrize("url", [
    f"http://example.org{PATH}", f"ftp://127.0.0.1{PATH}", "file:///etc/passwd", f"http://127.0.0.1.example.org{PATH}", PATH,
    f"http://localhost@example.org{PATH}", "http://[::1"])
def test_an_address_that_is_not_for_secrets_is_refused(run, url):
    with pytest.raises((ParameterError, ReportError)) as e: post_webhook(url, message(run), tries=1)
    assert "hush" not in str(e.value) and "example" not in str(e.value)


def test_the_address_is_told_to_nobody(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1] # and closed again
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HOOK": f"http://127.0.0.1:{port}{PATH}", "BAD": "not-an-address-but-secret"}
    code = "import time; time.sleep = lambda s: None; from visrec_nb.cli import main; main()"
    for target, status in (("env:HOOK", 1), ("env:BAD", 2), ("env:NONE", 2), (env["HOOK"], 2)):
        done = subprocess.run([sys.executable, "-c", code, "report", "notify", run, "--to", target],
                              capture_output=True, text=True, env=env, check=False)
        assert done.returncode == status and done.stderr.count("\n") == 1, done.stderr
        assert "hush-hush" not in done.stdout + done.stderr and str(port) not in done.stderr and "but-secret" not in done.stderr
        assert "Traceback" not in done.stderr


def test_who_is_told_when(run, monkeypatch):
    sent: list[str] = []
    with hook() as server:
        monkeypatch.setenv("HOOK", server.url)
        assert not notify(run, "env:HOOK", only="failed") and not notify(run, "env:HOOK", only="alerts") and server.got == []
        (run.parent.parent / "alerts.yaml").write_text("- accuracy < 0.9\n")
        assert not notify(run, "env:HOOK", only="failed") and notify(run, "env:HOOK", only="alerts")
        manifest = json.loads((run / "manifest.json").read_text())
        write_json(run / "manifest.json", manifest | {"status": "failed", "error": "catalog.csv: empty label (row 3)", "conclusion": None})
        try_notify(run, ["env:NO_HOOK", "mailto:nobody", "env:HOOK"], sent.append, only="failed")
    assert len(server.got) == 2 and "failed" in server.got[1][2]["text"] and "empty label (row 3)" in server.got[1][2]["text"]
    assert len(sent) == 2 and all(text.startswith("notification to ") for text in sent)


# Mail


class Mail(socketserver.StreamRequestHandler):
    "As much of a mail server as a client needs."

    def say(self, text): self.wfile.write(f"{text}\r\n".encode())

    def handle(self):
        self.say("220 here")
        secure, server = isinstance(self.request, ssl.SSLSocket), self.server
        while line := self.rfile.readline().decode().strip():
            verb = line[:8].upper()
            server.heard.append((secure, line))
            if verb.startswith("EHLO"):
                self.say("250-here")
                if server.context and not secure: self.say("250-STARTTLS")
                self.say("250 AUTH PLAIN")
            elif verb == "STARTTLS":
                self.say("220 go on")
                try: self.request = server.context.wrap_socket(self.request, server_side=True)
                except (ssl.SSLError, OSError): return
                self.rfile, self.wfile, secure = self.request.makefile("rb"), self.request.makefile("wb", 0), True
            elif verb == "DATA":
                self.say("354 go on")
                data = b""
                while (part := self.rfile.readline()) != b".\r\n": data += part
                server.mails.append(email.message_from_bytes(data, policy=email.policy.default))
                self.say("250 taken")
            elif verb.startswith("RCPT") and "refused@" in line: self.say("550 no such person")
            elif verb.startswith("QUIT"): return self.say("221 bye")
            else: self.say("235 fine" if verb.startswith("AUTH") else "250 fine")


@contextmanager
def mail_server(context=None):
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail)
    server.context, server.heard, server.mails = context, [], []
    with serving(server):
        server.place = f"localhost:{server.server_address[1]}"
        yield server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    "A server's certificate for localhost, and its file."
    if shutil.which("openssl") is None: pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key", "-out", folder / "cert"],
                   check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    return context, folder / "cert"


def test_a_mail_on_this_machine(run):
    to = "mailto:ann@example.org,bob@example.org?server={}&from=visrec@example.org"
    with mail_server() as server: assert notify(run, to.format(server.place))
    mail, = server.mails
    assert mail["Subject"] == "photos: ok" and mail["To"] == "ann@example.org, bob@example.org" and mail["From"] == "visrec@example.org"
    assert "größer" in mail.get_content() and str(run / "index.html") in mail.get_content().replace("\n", "")
    assert [line for _, line in server.heard if line.startswith("rcpt")] == ["rcpt TO:<ann@example.org>", "rcpt TO:<bob@example.org>"]


def test_a_password_goes_over_tls_only(run, certificate, monkeypatch):
    context, file = certificate
    monkeypatch.setenv("SMTP_PASSWORD", "hush-hush-password")
    to = "mailto:ann@example.org?server={}&from=v@example.org&user=reports&password=env:SMTP_PASSWORD"
    with mail_server(context) as server:
        with pytest.raises(ParameterError, match="encrypted"): notify(run, to.format(server.place))
        with pytest.raises(ReportError, match="certificate"): notify(run, to.format(server.place) + "&tls=yes") # nobody vouches for it
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        assert notify(run, to.format(server.place) + "&tls=yes")
    assert len(server.mails) == 1 and [secure for secure, line in server.heard if line.startswith("AUTH")] == [True]
    with mail_server() as server: # one that cannot encrypt
        with pytest.raises(ReportError, match="no encryption; nothing was sent"): notify(run, to.format(server.place) + "&tls=yes")
    assert server.mails == [] and not any(line.startswith(("AUTH", "mail", "rcpt")) for _, line in server.heard)


@pytest.mark.parametrize("to", [
    "mailto:", "mailto:ann", "mailto:a@b.c%0d%0aBcc:x@y.z", "mailto:a@b.c?sever=x", "mailto:a@b.c?user=x", "mailto:a@b.c?server=x:y",
    "mailto:a@b.c?from=x", "mailto:a@b.c?user=u&password=literal-secret", "ann@example.org", "https://example.org/hook"])
def test_a_wrong_target_is_refused_before_anything_is_sent(run, to):
    with pytest.raises(ParameterError) as e: notify(run, to)
    assert "literal" not in str(e.value)


def test_a_mail_that_cannot_be_delivered(run):
    with mail_server() as server:
        with pytest.raises(ReportError, match=r"refused refused@example\.org"):
            send_mail(f"mailto:refused@example.org?server={server.place}&from=v@example.org", message(run))
        with pytest.raises(ReportError, match=r"refused refused@example\.org"):
            send_mail(f"mailto:ann@example.org,refused@example.org?server={server.place}&from=v@example.org", message(run))
    assert len(server.mails) == 1 # to Ann
    with pytest.raises(ReportError, match="could not be reached"): send_mail(f"mailto:a@b.c?server={server.place}", message(run))


def test_a_name_cannot_write_headers(run):
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", manifest | {"run": "a\r\nBcc: x@y.z\r\n\r\nboo"})
    with mail_server() as server: notify(run, f"mailto:ann@example.org?server={server.place}&from=v@example.org")
    assert server.mails[0]["Bcc"] is None and server.mails[0]["Subject"] == "a Bcc: x@y.z boo: ok"
