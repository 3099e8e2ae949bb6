"""Headless Chromium: the system's, or the one in Qt's Python packages (the `browser` extra)."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.server import free_port

START_SECONDS = 60
MISSING = "no browser: install Debian's chromium and chromium-driver, or molehill's extra `browser`"
# Chromium's sandbox does not start as root.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


@contextmanager
def headless(flags: Sequence[str]) -> Iterator[Any]:
    """Selenium's driver of a new browser; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    installed, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if installed and driver:
        options.binary_location = installed
        for flag in ("--headless=new", *FLAGS, *flags):
            options.add_argument(flag)
        with _driving(webdriver, options, driver) as chrome:
            yield chrome
        return
    if not all(map(importlib.util.find_spec, ("PySide6", "chromedriver_py"))):
        pytest.skip(MISSING)
    import chromedriver_py

    with _packaged([*FLAGS, *flags]) as address:
        options.debugger_address = address
        with _driving(webdriver, options, chromedriver_py.binary_path) as chrome:
            yield chrome


@contextmanager
def _driving(webdriver: Any, options: Any, driver: str) -> Iterator[Any]:
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@contextmanager
def _packaged(flags: Sequence[str]) -> Iterator[str]:
    """Qt's Chromium, and the address where it takes DevTools' protocol."""
    address = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_REMOTE_DEBUGGING": address,
        "QTWEBENGINE_CHROMIUM_FLAGS": " ".join(flags),
    }
    script = Path(__file__).with_name("qt_browser.py")
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        _wait(address, process)
        yield address
    finally:
        process.kill()
        process.wait()


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://{address}/json/version", timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"Qt's Chromium did not start (it ended with {process.poll()})")
