"""A window of Qt's Chromium, for tests/support/browsers.py: run as a script."""

import sys

from PySide6.QtWebEngineCore import qWebEngineChromiumVersion
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

if __name__ == "__main__":
    app = QApplication(sys.argv)
    # What it tells its driver that it is.
    app.setApplicationName("Chrome")
    app.setApplicationVersion(qWebEngineChromiumVersion())
    view = QWebEngineView()
    view.setUrl("about:blank")
    view.show()
    sys.exit(app.exec())
