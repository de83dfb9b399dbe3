//! The outside of the programs: arguments, log lines, progress, listings, JSON lines, exit codes. Only this prints.
//!
//! # Streams
//!
//! Results (listings, plans) go to stdout, log lines and progress to stderr. With `qmprestore merge --out -` stdout is the
//! disk, and what would go there goes to stderr. Control characters in names are escaped wherever they are printed.
//!
//! # JSON lines
//!
//! With `--json` each line of stdout (of stderr with `merge --out -`) is an object with an `event`. Times are seconds
//! since 1970, sizes bytes; what is unknown is `null`. JSON is UTF-8: bytes of names and paths that are not are U+FFFD, but
//! `commands` have them as they are, in escapes of the shell. Fields and events may be added. All programs have these:
//!
//! | event | fields |
//! |---|---|
//! | `progress` | `done` and `total` bytes, `rate` in a second, `eta` in seconds; of `qmprestore` also the `phase`, of `qmpbackup` the `disks` (each `disk`, `done`, `total`), where total is what there is to copy |
//! | `warning` | `message`; the exit code will be 3, or that of something worse |
//! | `done` | `exit_code`, and what the tables below say: the last line where the program does not fail |
//! | `error` | `message`, `advice`, `exit_code`: the last line where the program fails |
//!
//! `qmpbackup` has these:
//!
//! | event | fields |
//! |---|---|
//! | `connected` | `qemu`, its version, and `package`, what the distribution calls its build |
//! | `machine` | `name`, `status` |
//! | `skipped` | `disk`, `why` (`empty`, `removable`, `raw`, `excluded`, `not included`) |
//! | `level` | `disk`, `level` (`FULL`, `INC`, `COPY`), `reason`, `changed` bytes of an INC |
//! | `target` | `disk`, `path` of the image, `size` of the disk |
//! | `moment` | `stopped_ms`, how long the machine stood still, `frozen_ms`, how long the guest's `file_systems` were frozen, and how many |
//! | `copied` | `bytes`, `seconds`, `rate` |
//! | `sealing` | `done` and `total` bytes of the images that have checksums: while that takes longer |
//! | `sealed` | `bytes` of the images, which are synced and have checksums, `seconds` it took |
//! | `image` | `disk`, `path`, `level`, `time` |
//! | `recovered` | `what` an earlier run had left |
//! | `bitmap_removed` | `name`, `node` |
//! | `notice` | `message`: one should know it, though nothing is wrong |
//! | `command` | `phase` (`lock`, `prepare`, `moment`, `start`), `command` as QEMU would get it: `backup --dry-run` |
//! | `blockdev` | `disks` (each `node`, `device`, `qdev`, `format`, `filename`, `driver`, `path` of the file's folder, `virtual_size`, `backing_image`, whether there is one, `has_bitmap`, `bitmaps`): `info --show blockdev` |
//! | `bitmaps` | `nodes`, of each an array of bitmaps (each `name`, `count` of dirty bytes, `granularity` in bytes, `recording`, `busy`, `persistent`, `inconsistent`): `info --show bitmaps` |
//! | `done` | of `backup` that is no dry run `time`, `images` (each `path`, `level`), `bytes` of their files, `seconds`; of `cleanup` `removed`, how many |
//!
//! `qmprestore` has these, and `qmprebase` those of a commit:
//!
//! | event | fields |
//! |---|---|
//! | `plan` | `disk`, `restore_point`, `time`, `images` (each `path`, `level`, `time`, `format`, `size`, `cluster_size`, `file_length`), `output` (`path`, `format`, `cluster_size`, `compression`, `length`, where compressed the most it can be), `size` of the disk, `bytes` to move, `dry_run`, `commands`, lines for one shell |
//! | `plan` of a rebase | `disk`, `restore_point`, `time`, `images` (the INCs, each `path`, `backing`, `done`), `link` (`path`, `target`, `done`), `dry_run`, `commands`, lines for one shell |
//! | `rebased` | `path` of an INC that was changed, `backing`, the name that it has now |
//! | `link` | `path` of the link that was set, `target` |
//! | `phase` | `phase`: `checking`, `verifying`, `summing`, `planning`, `copying`, `syncing`, `comparing` |
//! | `manifest` | `path`, `level`, `time` of an image; `made` (`manifest`, `checksums`), what it has got, or would where `dry_run`: nothing where it has both |
//! | `restore_point` | `disk`, `chain`, `name`, `path`, `level`, `time`, `rfc3339`, `size`, `allocated`, `file_length`, `file_usage`, `state` (`ok`, `doubtful`, `marked corrupt`, `broken`), `reason` |
//! | `partial` | `disk`, `path` of what a failed run left |
//! | `check` | `path`, `verdict` (`clean`, `leaks`, `dirty`, `marked corrupt`, `damaged`, `unreadable`, `in use`, `raw`), `reason` where it was not checked, else `file_length`, of qcow2 images also `version`, `size`, `cluster_size`, `compression`, `snapshots`, `bitmaps`, `features`, `backing`, `clusters` (`total`, `allocated`, `compressed`, `fragmented`), `leaks`, `refcount_errors`, `structure_errors`, `findings` (each `severity` (`leak`, `refcount`, `structure`), `message`), `findings_dropped`, how many more; with `--repair` that is what is left, and `before` (`verdict`, `leaks`, `refcount_errors`, `structure_errors`) what was there, else null |
//! | `finding` | of a verify: `disk`, `path` of the image or of the file beside it that is meant, `kind` (`chain`, `doubtful`, `no manifest`, `manifest`, `no checksums`, `checksums`, `unsettled`, `unreadable`, `structure`, `marked corrupt`, `stale`, `leaks`, `blocks`, `more blocks`, `length`, `content`), `severity` (`note`, `in part`, `failed`, `damage`), `message`, `file` (`start`, `end`), the bytes that are meant, `guest` (each `start`, `end`), what of the disk they hold, null where that is unknown, `parts` (`header`, `l1 table`, `l2 table`, `data`, `compressed`), `points`, the paths of the restore points that suffer |
//! | `verified` | an image: `disk`, `path`, `verdict` (`right`, or the worst `severity`), `file_length`, `bytes` that were compared with checksums, `structure`, whether its tables were checked |
//! | `plan` | of a commit `disk`, `restore_point`, `time`, `full` (path), `incs` (paths, oldest first), `rest` (those that an interrupted run has written already), `snapshots` (names of those that the FULL will get), `size` of the disk, `bytes` to write, `growth` of the FULL at most, `dry_run`, `commands`, lines for one shell |
//! | `snapshot` | `name` of an internal snapshot that the FULL has got |
//! | `removed` | `path` of an INC that the FULL holds now |
//! | `done` | of a verify `images` and `findings`, how many, `bytes` that were compared, `total` bytes of all images, `seconds`, `rate` |
//! | `done` | of a commit that is no dry run `output` (the FULL), `size`, `bytes`, `seconds`, `rate` |
//! | `done` | of a merge that is no dry run `output`, `size`, `bytes`, `length`, `seconds`, `rate` |
//! | `anywhere` | of a merge with `--salvage`: `kind` (`stale`, `damaged`), `message`, why all of the disk may be that, which is not listed |
//! | `loss` | of a merge with `--salvage`: `kind` (`lost`, `stale`, `damaged`), `start` on the disk, `bytes`, `image`, the path of that which does not hold them, `cause` (`missing`, `image`, `tables`, `data`, `checksum`, `truncated`, `shared`), `message` |
//! | `unlisted` | `losses`, how many more there are than are listed, `start` of the first of them |
//! | `done` | of a merge with `--salvage`, also of a dry run: `losses`, how many, `unlisted`, how many of them are not listed, `lost`, `stale` and `damaged`, bytes of each kind |
//!
//! # Exit codes
//!
//! [`Exit`] lists them. Any warning makes a success 3.

mod backup;
mod console;
mod exit;
mod failure;
mod log_file;
mod pace;
mod rebase;
mod restore;
mod signals;
mod start;
mod syslog;
mod table;
mod text;
mod units;

pub use backup::Arguments as BackupArguments;
pub use exit::Exit;
pub use rebase::Arguments as RebaseArguments;
pub use restore::Arguments as RestoreArguments;
