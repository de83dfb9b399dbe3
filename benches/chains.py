"""Chains to measure, and what measures them."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MERGE = ROOT / "target/release/qmprestore"
# Before the clock starts, so that what went before is over
PAUSE = 0.3
MIB = 1 << 20


def run(*command, **options):
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, **options)


class Chain:
    """A FULL and its INCs, and a copy in which each names the one before it, for qemu-img."""

    def __init__(
        self, place, size, full, incs, inc_bytes, create="", compress=False, spread=1, small=False, sums=False,
        rebased=True
    ):
        # rows with the same chain share it
        place /= f"{size}-{full}-{incs}-{inc_bytes}-{create}-{compress}-{spread}-{small}-{sums}"
        self.dir = place / "backup"
        self.rebased = place / "rebased"
        if not self.dir.is_dir():
            self.dir.mkdir(parents=True)
            self.write(place / "noise", size, full, incs, inc_bytes, create, compress, spread, small)
            if sums:
                run(MERGE, "manifest", "--quiet", "--dir", self.dir)
        if rebased and not self.rebased.is_dir():
            self.rebase()
        self.newest = self.rebased / self.images()[-1]

    def write(self, noise, size, full, incs, inc_bytes, create, compress, spread, small):
        numbers = random.Random(1)
        # half of it repeats: it compresses as programs and logs do
        noise.write_bytes(b"".join(numbers.randbytes(2048) + bytes([i & 127]) * 2048 for i in range(4096)))
        used = []
        for number in range(incs + 1):
            image = self.dir / f"{'INC' if number else 'FULL'}-{1600000000 + number}-disk"
            run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", create] if create else []), image, size)
            commands = list(self.writes(numbers, number, full, inc_bytes, used, spread, small))
            flag = "-c " if compress else ""
            lines = "\n".join(f"write -q {flag}-s {noise} {start} {length}" for start, length in commands)
            run("qemu-io", "-f", "qcow2", "-t", "unsafe", image, input=lines.encode())
        noise.unlink()

    def rebase(self):
        shutil.copytree(self.dir, self.rebased)
        names = self.images()
        for name, before in zip(names[1:], names):
            run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", before, self.rebased / name)

    def images(self):
        """The names of the images, oldest first."""
        names = (path.name for path in self.dir.iterdir() if path.is_file())
        return sorted(names, key=lambda name: name.split("-")[1])

    def by_hand(self, work):
        """The commands of the Python tool: copies of all images, of which each goes into the one before it, the newest
        first; the output is the FULL's copy."""
        images = self.images()
        steps = [["mkdir", "-p", work]]
        steps += [["cp", "--reflink=never", self.dir / name, work / name] for name in images]
        for before, inc in reversed(list(zip(images, images[1:]))):
            base = work / before
            steps.append(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, work / inc])
            steps.append(["qemu-img", "commit", "-b", base, work / inc])
            steps.append(["rm", work / inc])
        return steps + [["mv", work / images[0], work.with_suffix(".qcow2")], ["rm", "-r", work]]

    @staticmethod
    def writes(numbers, number, full, inc_bytes, used, spread, small):
        done = 0
        if number == 0:
            place = 0
            while done < full:
                length = numbers.choice([256 * 1024, MIB, 4 * MIB, 16 * MIB])
                yield place, length
                used.append((place, length))
                place += (length + numbers.choice([0, 0, MIB])) * spread // 65536 * 65536
                done += length
            return
        written = set()
        while done < inc_bytes:
            place, room = numbers.choice(used)
            length = min(room, 65536 if small else numbers.choice([65536, 65536, 131072, MIB]))
            start = place + numbers.randrange(0, room - length + 1) // 65536 * 65536
            clusters = range(start // 65536, (start + length) // 65536)
            # once each: QEMU 10.0 damages compressed clusters that it replaces
            if written.isdisjoint(clusters):
                written.update(clusters)
                yield start, length
                done += length


def timed(command, out):
    """The time of one command, or of several, until the output is on the disk."""
    commands = command if isinstance(command[0], list) else [command]
    out.unlink(missing_ok=True)
    os.sync()
    # XFS gives blocks back in the background, and asking for what is free has it do so now
    os.statvfs(out.parent)
    time.sleep(PAUSE)
    start = time.monotonic()
    for words in commands:
        run(*words)
    with open(out, "rb") as file:
        os.fsync(file.fileno())
    return time.monotonic() - start


def peak(command):
    """The memory that a command needs, in MiB: looked at all the time, as what wait4 tells counts our own, too."""
    child = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    most = 0
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except OSError:
            continue
        most = max([most, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))])
        time.sleep(0.001)
    if child.returncode:
        sys.exit(f"{command} failed")
    return most / 1024
