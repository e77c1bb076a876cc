"""Open every page of the built documentation in headless Chromium, at 1200 and 400 pixels.

    python tools/docs/check_pages.py build/docs

Fails if a page logs an error, misses a file, scrolls sideways, or has a table or picture wider than its column.  At 400
pixels a wide table may scroll within its column, but none of its own columns is squeezed to single letters.  A local
server adds a script to each page that records errors; one more page loads all others in a frame and measures them.
"""

import argparse
import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

WIDTHS = (1200, 400)
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
RECORD = """<script>window.problems = [];
addEventListener('error', e => problems.push(e.message || 'cannot load ' + (e.target.src || e.target.href)), true);
addEventListener('unhandledrejection', e => problems.push(String(e.reason)));
console.error = (...words) => problems.push(words.join(' '));</script>"""
MEASURE = """<!doctype html><body style="margin:0"><script>
const found = {};
const wait = ms => new Promise(done => setTimeout(done, ms));
async function open(page, width) {
  const frame = document.body.appendChild(document.createElement('iframe'));
  frame.style = `width:${width}px;height:900px;border:0`;
  await new Promise(done => { frame.onload = done; frame.src = page; });
  await wait(150);
  const view = frame.contentWindow, root = view.document, problems = view.problems || ['the page has no script'];
  const wide = root.documentElement.scrollWidth;
  if (wide > width) problems.push(`scrolls sideways: ${wide} px`);
  for (const element of root.querySelectorAll('article table, article img, article svg')) {
    const [size, column] = [element, element.closest('article')].map(e => e.getBoundingClientRect().width);
    const words = element.textContent.trim().slice(0, 40) || element.alt;
    if (size > column + 1 && (width >= 800 || element.tagName !== 'TABLE'))
      problems.push(`${element.tagName} of ${Math.round(size)} px in ${Math.round(column)} px: ${words}`);
    if (element.tagName === 'IMG' && !element.naturalWidth) problems.push(`picture without a size: ${element.src}`);
  }
  for (const cell of root.querySelectorAll('article td, article th')) {
    const words = cell.textContent.trim(), box = cell.getBoundingClientRect();
    if (words.length > 3 && box.width && box.height > 8 * box.width) problems.push(`a column is squeezed: ${words}`);
  }
  found[`${page} at ${width}`] = problems;
  frame.remove();
}
(async () => {
  for (const page of PAGES) for (const width of WIDTHS) await open(page, width);
  await fetch('/found', {method: 'POST', body: JSON.stringify(found)});
})();</script>"""


def make_handler(site: Path, found: dict, done: threading.Event):
    """A handler that serves the site, the page that measures, and takes what it found."""
    pages = sorted(str(path.relative_to(site)) for path in site.glob('*.html') if path.name != '404.html')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(site), **kwargs)

        def do_GET(self):
            if self.path == '/measure':
                return self.answer(MEASURE.replace('PAGES', json.dumps(pages)).replace('WIDTHS', json.dumps(WIDTHS)))
            path = site / self.path.partition('?')[0].lstrip('/')
            if path.suffix == '.html' and path.is_file():
                return self.answer(path.read_text().replace('<head>', f'<head>{RECORD}', 1))
            return super().do_GET()

        def do_POST(self):
            found.update(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            self.answer('')
            done.set()

        def answer(self, text):
            body = text.encode()
            self.send_response(200)
            self.send_header('Content-Type', 'text/html; charset=utf-8')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    return Handler


def browse(browser: str, profile: str, url: str, *options: str) -> subprocess.Popen:
    """Start the browser on a page."""
    flags = ('--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', f'--user-data-dir={profile}')
    return subprocess.Popen([browser, *flags, *options, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def check(site: Path, browser: str, seconds: int = 300) -> dict:
    """The problems of every page and width.

    Raises:
        TimeoutError: If the browser does not finish.
    """
    found: dict = {}
    done = threading.Event()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), make_handler(site, found, done)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            process = browse(browser, profile, f'http://127.0.0.1:{server.server_port}/measure')
            finished = done.wait(seconds)
            process.kill()
            process.wait()
        server.shutdown()
    if not finished:
        raise TimeoutError(f'{browser} did not finish in {seconds} s')
    return found


def main(argv=None) -> int:
    """Check the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('site', type=Path, help='folder of the built documentation')
    args = parser.parse_args(argv)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f'error: none of {", ".join(BROWSERS)} is on PATH; Debian: apt-get install chromium', file=sys.stderr)
        return 2
    if not (args.site / 'index.html').is_file():
        print(f'error: {args.site} has no index.html; run make docs first', file=sys.stderr)
        return 2
    found = check(args.site, browser)
    for page, problems in found.items():
        for problem in problems:
            print(f'{page}: {problem}')
    bad = sum(map(bool, found.values()))
    print(f'{len(found)} views of {len(found) // len(WIDTHS)} pages, {bad} with problems')
    return int(bad > 0)


if __name__ == '__main__':
    sys.exit(main())
