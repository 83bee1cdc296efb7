"""Reads the package's facts from settings.ini, and puts the report templates of nbs/ into the wheel."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
facts = parser["DEFAULT"]

EXTRAS = ("data", "vision", "recsys", "reports", "cloud", "widgets", "dev")
extras = {name: facts[f"{name}_requirements"].split() for name in EXTRAS}
extras["all"] = sorted({requirement for requirements in extras.values() for requirement in requirements})


class BuildWithNotebooks(build_py):
    """An installed package carries the report templates as `visrec_nb/reports/notebooks`."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / facts["lib_name"] / "reports" / "notebooks"
            target.mkdir(parents=True, exist_ok=True)
            for notebook in sorted((HERE / facts["nbs_path"] / "reports" / "notebooks").glob("*.ipynb")):
                shutil.copyfile(notebook, target / notebook.name)


setup(
    version=facts["version"],
    description=facts["description"],
    author=facts["author"],
    author_email=facts["author_email"],
    keywords=facts["keywords"].split(),
    python_requires=f">={facts['min_python']}",
    packages=find_packages(include=[facts["lib_name"], f"{facts['lib_name']}.*"]),
    package_data={facts["lib_name"]: ["py.typed", "reports/theme/**/*"]},
    install_requires=facts["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": facts["console_scripts"].split(),
        "nbdev": [f"{facts['lib_name']}={facts['lib_name']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithNotebooks},
)
