"""What several test files do alike: run the command, read a report's page."""

import html
import re
import subprocess
import sys


def visrec(*args, **options) -> subprocess.CompletedProcess:
    "Run the command as a shell would; `options` are those of `subprocess.run`."
    command = [sys.executable, "-c", "from visrec_nb.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def page_words(run) -> str:
    "The text of a report's page, without its marks."
    page = (run.folder / "index.html").read_text(encoding="utf-8")
    page = re.sub(r"<style.*?</style>|<script.*?</script>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))
