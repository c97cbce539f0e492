"""What a student takes when the present code writes its packed file:
python benchmarks/smollm2/write_anew.py STUDENT.npz

Appends the bytes of the file, as it is and as it becomes, to written_anew.json beside this file.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from lowbit.files.packed import read_packed, write_members  # noqa: E402
from studies.bench import machine  # noqa: E402


def main() -> None:
    path, out = Path(sys.argv[1]), HERE / "written_anew.json"
    with np.load(path, allow_pickle=False) as z:
        members = {k: z[k] for k in z.files}
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, path.name)
        with new.open("wb") as f:
            write_members(f, members)
        found, size = read_packed(new), new.stat().st_size
        with zipfile.ZipFile(new) as z:
            parts = {i.filename: i.compress_size for i in z.infolist()}
    weights = sum(t.values.size for t in found.tensors.values())
    record = {
        "student": path.name,
        "bytes_before": path.stat().st_size,
        "bytes": size,
        "smaller_than_float32": 4 * weights / size,
        "members": parts,
        **machine(),
    }
    every = [*json.loads(out.read_text()), record] if out.exists() else [record]
    out.write_text(json.dumps(every, indent=1) + "\n")
    print(record)


if __name__ == "__main__":
    main()
