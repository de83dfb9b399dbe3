"""Runs the virtual machine of `make` for four days and backs its disk up on each of them.

    record.py QEMU GUEST DAYS_DIR UUID TIME...

QEMU: qemu-system-x86_64; GUEST: folder with vmlinuz and initramfs; TIME: unix times of the restore points. Works in the
current folder, with relative names only, on `disk.qcow2` there. Leaves `chain/`, and for each TIME `live/TIME.raw`, a
copy of the disk taken beside the backup, and `files/TIME.md5`, the sums of all files as the guest sees them.
"""

import json
import os
import socket
import subprocess
import sys
import time

NODE = "disk0"
# One INC is packed with the other codec, as when somebody changes the settings halfway
CODEC = {2: "zstd"}


class Lines:
    """A socket of QEMU, line by line."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(120)
        for _ in range(100):
            try:
                self.socket.connect(path)
                break
            except OSError:
                time.sleep(0.1)
        else:
            sys.exit(f"QEMU made no {path}")
        self.lines = self.socket.makefile("rw", encoding="utf-8", newline="\n")

    def send(self, text):
        self.lines.write(text + "\n")
        self.lines.flush()

    def read(self):
        line = self.lines.readline()
        if not line:
            sys.exit("QEMU hung up")
        return line.rstrip("\r\n")


class Monitor(Lines):
    """QMP: commands, and waiting for jobs."""

    def __init__(self, path):
        super().__init__(path)
        self.read()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.send(json.dumps({"execute": command, "arguments": arguments}))
        while True:
            answer = json.loads(self.read())
            if "error" in answer:
                sys.exit(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def finish(self, job):
        while True:
            status = next(j for j in self("query-jobs") if j["id"] == job)
            if status["status"] == "concluded":
                if "error" in status:
                    sys.exit(f"{job}: {status['error']}")
                return self("job-dismiss", id=job)
            time.sleep(0.05)


class Guest(Lines):
    """The guest's shell on a virtio serial port."""

    def run(self, script):
        self.send(f"sh -e <<'END OF SCRIPT'\n{script}\nEND OF SCRIPT\necho EXIT $?")
        output = []
        while not (line := self.read()).startswith("EXIT "):
            output.append(line)
        if line != "EXIT 0":
            sys.exit("\n".join(["the guest failed:", *output]))
        return output


def add_bitmap(bitmap):
    return {"type": "block-dirty-bitmap-add", "data": {"node": NODE, "name": bitmap, "persistent": True}}


def backup(monitor, day, moment, previous, uuid):
    """One restore point: a new bitmap begins and the backup takes what there is, in the same moment."""
    level = "INC" if previous else "FULL"
    name = f"chain/{NODE}/{level}-{moment}-disk.qcow2"
    partial = name + ".partial"
    size = os.path.getsize("empty.raw")
    options = f"cluster_size=16k,compression_type={CODEC.get(day, 'zlib')}"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, partial, str(size)], check=True)
    monitor("blockdev-add", node_name="target", driver="qcow2", discard="unmap",
            file={"driver": "file", "filename": partial})
    job = {"job-id": "backup", "device": NODE, "target": "target", "compress": True, "auto-dismiss": False}
    actions = [add_bitmap(f"qmpbackup-{moment}-{uuid}")]
    if previous:
        old = {"node": NODE, "name": f"qmpbackup-{previous}-{uuid}"}
        job |= {"sync": "bitmap", "bitmap": old["name"], "bitmap-mode": "never"}
        actions.append({"type": "block-dirty-bitmap-disable", "data": old})
    else:
        job["sync"] = "full"
    actions.append({"type": "blockdev-backup", "data": job})
    monitor("transaction", actions=actions)
    monitor.finish("backup")
    monitor("blockdev-del", node_name="target")
    os.rename(partial, name)
    if previous:
        monitor("block-dirty-bitmap-remove", **old)


def main():
    qemu, guest_dir, days, uuid, *moments = sys.argv[1:]
    for folder in (f"chain/{NODE}", "live", "files"):
        os.makedirs(folder)
    process = subprocess.Popen([
        qemu, "-accel", "tcg", "-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-S",
        "-rtc", f"base={time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(int(moments[0]) - 60))}",
        "-kernel", f"{guest_dir}/vmlinuz", "-initrd", f"{guest_dir}/initramfs",
        "-append", "console=ttyS0 quiet guest=serve",
        "-serial", "file:console", "-qmp", "unix:qmp,server=on,wait=off",
        "-chardev", "socket,id=shell,path=shell,server=on,wait=off",
        "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=shell,name=shell",
        "-blockdev", f"node-name={NODE},driver=qcow2,discard=unmap,detect-zeroes=unmap,"
                     "file.driver=file,file.filename=disk.qcow2,file.discard=unmap",
        "-device", f"virtio-blk-pci,drive={NODE}",
    ], stdin=subprocess.DEVNULL)
    try:
        monitor, guest = Monitor("qmp"), Guest("shell")
        monitor("cont")
        while guest.read() != "READY":
            pass
        with open(f"{days}/words", encoding="utf-8") as file:
            words = file.read()
        for day, moment in enumerate(moments, 1):
            with open(f"{days}/{day}", encoding="utf-8") as file:
                guest.run(f"date -s @{int(moment) - 30} >/dev/null\n{words}\n{file.read()}")
            sums = guest.run(f"echo {day} >/disk/restore-point\nsync\nfile-sums")
            with open(f"files/{moment}.md5", "w", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in sums))
            guest.run("fsfreeze --freeze /disk")
            monitor("stop")
            backup(monitor, day, moment, moments[day - 2] if day > 1 else None, uuid)
            subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", "disk.qcow2", f"live/{moment}.raw"], check=True)
            if day == 1:
                info = ["qemu-img", "info", "-U", "--output", "json", "disk.qcow2"]
                with open("chain/disk.qcow2.config", "wb") as file:
                    subprocess.run(info, stdout=file, check=True)
            monitor("cont")
            guest.run("fsfreeze --unfreeze /disk")
            print(f"day {day}: {moment}")
        monitor("quit")
        process.wait(60)
    finally:
        process.kill()
    with open("chain/uuid", "w", encoding="utf-8") as file:
        file.write(uuid)


main()
