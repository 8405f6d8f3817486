import sys
from pathlib import Path

for room in ("analysis", "sweeps", "serving"):
    sys.path.insert(0, str(Path(__file__).parent.parent / room))
