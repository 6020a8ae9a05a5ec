"""The page of this folder, and an exported ONNX directory for it to load, on this machine alone.

python examples/browser/serve.py as-onnx      then open http://127.0.0.1:8000
"""

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
MODULES = HERE / "node_modules"
NEEDED = ("model.onnx", "tokenizer.json", "config.json")


class Handler(SimpleHTTPRequestHandler):
    """Files of three folders by the first part of their address; what a page measured is printed as a line of JSON."""

    def __init__(self, *given, model, **settings):
        self.extensions_map = {**self.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}
        self.folders = {
            "model": model,
            "transformers": MODULES / "@huggingface" / "transformers" / "dist",
            "onnxruntime": MODULES / "onnxruntime-web" / "dist",
        }
        super().__init__(*given, **settings)

    def translate_path(self, path):
        folder, _, rest = unquote(urlsplit(path).path).lstrip("/").partition("/")
        if not folder:
            return str(HERE / "index.html")
        within = self.folders.get(folder)
        file = (within / rest).resolve() if within is not None else HERE / "nothing"
        return str(file if within is not None and file.is_relative_to(within) and file.is_file() else HERE / "nothing")

    def do_POST(self):
        print(self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
        self.send_response(204)
        self.end_headers()

    def end_headers(self):
        # Pages that are isolated so may use several threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="what tensorfold export --to onnx wrote")
    parser.add_argument("--port", type=int, default=8000, help="0 is a free one")
    given = parser.parse_args()
    missing = [name for name in NEEDED if not (given.model / name).is_file()]
    if missing:
        sys.exit(f"{given.model} has no {', '.join(missing)}; needed what tensorfold export --to onnx wrote.")
    if not MODULES.is_dir():
        sys.exit(f"transformers.js is not installed; run: npm install --prefix {HERE}")
    server = ThreadingHTTPServer(("127.0.0.1", given.port), partial(Handler, model=given.model.resolve()))
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
