"""The page of `clara ui` as a Space: the variables CORPUS and MODEL name what it asks.

`recipes.spaces.publish` copies the package beside this file.
"""

import os
import sys

from modeling_clara.cli import main

if __name__ == "__main__":
    corpus, model = os.environ.get("CORPUS"), os.environ.get("MODEL")
    if not corpus:
        sys.exit("`CORPUS` must name a corpus on the Hub, got nothing. Set the variable in the settings of the Space.")
    sys.exit(main(["ui", corpus, *(["--model", model] if model else []), *sys.argv[1:]]))
