"""The leaderboard as it is published: built into a folder on sys.path, where its modules find each other.

`import board` comes before the import of any of them.
"""

import sys
import tempfile
from pathlib import Path

from recipes.spaces.publish import LEADERBOARD, build_space

HOME = tempfile.TemporaryDirectory(prefix="clara-board-")
FOLDER = Path(HOME.name)
build_space(LEADERBOARD, FOLDER)
sys.path.append(str(FOLDER))
