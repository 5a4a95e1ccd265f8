"""A real HTTP server that serves one archive, well or badly, by the first part of the path."""

import contextlib
import http.server
import threading
import time

STOPS = {
    "silent": 0,
    "stall": 50_000,
    "tire": 700_000,
}  # bytes before it stalls


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        mirror, path = self.server, self.path
        if path.startswith("http://"):  # asked as a proxy
            mirror.proxied.append(path)
            path = "/" + path.split("/", 3)[3]
        manner, wanted = path.split("/")[1], self.headers.get("Range")
        mirror.requests.append((manner, wanted))
        content, start = mirror.content, 0
        if manner == "gone":
            return self.send_error(404)
        if manner == "redirect":
            self.send_response(302)
            self.send_header("Location", f"{mirror.url}/good/a.tar.gz")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if manner == "page":
            content = b"<html>Please log in to this network</html>"
        elif manner == "lie":
            content = bytes(len(content))
        if wanted and not manner.startswith(("rangeless", "page")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if manner != "lengthless":
            self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):
            if manner in STOPS:
                self.wfile.write(content[start : start + STOPS[manner]])
                time.sleep(30)
            elif manner == "cut":
                self.wfile.write(content[start : start + len(content) // 3])
            elif manner.endswith("crawl"):  # 200 kB/s
                for position in range(start, len(content), 10_000):
                    self.wfile.write(content[position : position + 10_000])
                    time.sleep(0.05)
            elif manner == "once":  # the first request gets a third, later ones nothing
                first = [each for each, _ in mirror.requests].count(manner) == 1
                self.wfile.write(content[start : start + len(content) // 3] if first else b"")
            else:
                self.wfile.write(content[start:])


class Mirror(http.server.ThreadingHTTPServer):
    """The running server: its `url`, and what was asked of it."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.requests, self.proxied = content, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
