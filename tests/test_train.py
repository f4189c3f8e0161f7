import json
from pathlib import Path
def log_of(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
