"""A web server for stores that answers byte ranges, and goes wrong when told to."""

from __future__ import annotations

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class RangeServer(ThreadingHTTPServer):
    """Serves a folder with byte ranges; `faults` says how the next answers go wrong (one entry is used up per request)."""

    daemon_threads = True
    request_queue_size = 128  # a busy machine must not make a connection wait for a second try

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.faults: list[str] = []
        self.ranges: list[str] = []
        self.lock = threading.Lock()
        self.together = threading.Barrier(3)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of these tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.server.root / self.path.lstrip("/").replace("%3D", "=")
        asked = re.match(r"bytes=(\d+)-(\d+)?", self.headers.get("Range", ""))
        with self.server.lock:
            fault = self.server.faults.pop(0) if self.server.faults else ""
            if asked:
                self.server.ranges.append(self.headers["Range"])
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if fault == "slow down":
            fault = "503 SlowDown"
        if spoken := re.fullmatch(r"(\d{3}) (\w+)", fault):  # as S3 says it, who repeats what was sent
            told = f"<Code>{spoken[2]}</Code><Message>What {spoken[2]} means.</Message><Token-0>SECRET</Token-0>"
            body_xml = f"<?xml version='1.0' encoding='UTF-8'?>\n<Error>{told}</Error>".encode()
            self.send_response(int(spoken[1]))
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body_xml)))
            self.end_headers()
            self.wfile.write(body_xml)
            return
        if fault == "together":  # answered only while two others are under way
            try:
                self.server.together.wait(timeout=20)
            except threading.BrokenBarrierError:
                self.send_error(400)
                return
        if fault == "stall":
            time.sleep(3)
        if fault == "reset":
            self.connection.close()
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        total = len(data)
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or total - 1), total - 1)
            if first >= total:
                self.send_error(416)
                return
            data = data[first : last + 1]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if fault == "flip" and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        if body:
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            self.connection.close()
