"""Counts vector moves to and from the stack in compiled loops, by `objdump -d`.

    python tests/stack_traffic.py LIMIT FILE... [--functions REGEX]

FILE is an object or a library. Where a compiler lowers vectors of another length than its registers
have, or runs out of registers, hot loops go through the stack and take twice as long. Of each
matching function the share of such moves among its instructions is printed; above LIMIT (0.02 is
2 %), in functions of at least 100 instructions, the exit status is 1.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

MOVE = re.compile(r"\sv?mov(?:[au]p[sd]|dq[au]\d*|s[sd]|[hl]p[sd]|q|d)\s")
VECTOR = re.compile(r"%[xyz]mm\d")
STACK = re.compile(r"\(%r[sb]p")
FEW = 100  # instructions: in shorter functions one move is a large share


def stack_moves(file: Path) -> dict[str, tuple[int, int]]:
    """Of each function: how many instructions, how many move a vector to or from the stack."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", file],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    counts: dict[str, tuple[int, int]] = {}
    name = None
    for line in listing.splitlines():
        begins = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if begins:
            name = begins[1]
            counts[name] = (0, 0)
        elif name and "\t" in line:
            every, moves = counts[name]
            moved = MOVE.search(line) and VECTOR.search(line) and STACK.search(line)
            counts[name] = (every + 1, moves + bool(moved))
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("limit", type=float)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--functions", default="", help="regular expression, all by default")
    arguments = parser.parse_args()
    found, worst = 0, 0.0
    for file in arguments.files:
        for name, (every, moves) in sorted(stack_moves(file).items(), key=lambda item: -item[1][1]):
            if every < FEW or not re.search(arguments.functions, name):
                continue
            found += 1
            share = moves / every
            worst = max(worst, share)
            if moves:
                print(f"{share:6.1%} {moves:5d} of {every:6d}  {file.name}: {name}")
    if not found:
        print("no function matches", file=sys.stderr)
        return 2
    print(f"{found} functions, at most {worst:.1%} of their instructions")
    return int(worst > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
