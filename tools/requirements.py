"""Print the requirements in pyproject.toml for the package and the given extras, one per line.

For ``pip install -r``, which installs a development environment without building the package first.
"""

import sys
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
