"""A long-running driver: runs the command of each line of standard input (a JSON list of words) in one Spark session.

After a command's own output comes a line `exit CODE`.
"""

import json
import sys

from scgpt_batch.cli.main import main

if __name__ == "__main__":
    for line in sys.stdin:
        print("exit", main(json.loads(line)), flush=True)
