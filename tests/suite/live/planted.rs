//! What others have put into a backup folder, and what they can read of it: links that lead out of it are not followed, and
//! nothing has a wider mode than it needs, whatever the umask.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::field::Field;
use super::field_setup::{Setup, releases};
use super::proxy::{Action, Hook, Proxy};
use super::tool::Tool;
use crate::support::program::is_root;
use crate::support::sealed::seal;
use crate::support::sparse::{Fingerprint, fingerprints};

fn field(release: &'static str) -> Field {
    let mut field = Setup::of(release).image("disk.qcow2", "4M", "").qcow2("disk0", "disk.qcow2").start();
    field.scribble("disk0");
    std::fs::create_dir_all(&field.target).unwrap();
    field
}

/// A folder beside the target that holds something precious, which stays as it is.
struct Elsewhere {
    path: PathBuf,
    before: BTreeMap<String, Fingerprint>,
}

impl Elsewhere {
    fn of(field: &Field) -> Self {
        let path = field.vm.path("elsewhere");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("precious"), "most precious").unwrap();
        let before = fingerprints(&path).into_iter().collect();
        Self { path, before }
    }

    #[track_caller]
    fn assert_same(&self) {
        assert_eq!(fingerprints(&self.path).into_iter().collect::<BTreeMap<_, _>>(), self.before);
    }
}

#[test]
fn no_backup_goes_where_a_link_in_its_folder_leads() {
    for release in releases(&["10.0"]) {
        let mut field = field(release);
        let elsewhere = Elsewhere::of(&field);
        let target = field.target.clone();
        // the link, what it leads to, and what is said
        let links = [
            ("disk0", "", "is a link"),
            ("disk0/.qmpbackup", "", "is a link"),
            (".qmpbackup", "", "is a link"),
            (".qmpbackup/lock", "precious", "is a link"),
            (".qmpbackup/lock", "new", "is a link"),
            ("uuid", "precious", "uuid: "),
            ("uuid", "new", ""),
            (".qmpbackup/run.json", "new", ""),
            ("disk.qcow2.config", "precious", ""),
            ("disk.qcow2.config", "new", ""),
        ];
        for (name, to, said) in links {
            let link = target.join(name);
            std::fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(elsewhere.path.join(to), &link).unwrap();
            let ended = field.backup("--level full", i32::from(!said.is_empty()));
            ended.says(said);
            elsewhere.assert_same();
            std::fs::remove_dir_all(&target).unwrap();
            std::fs::create_dir(&target).unwrap();
            field.run("cleanup --remove-bitmap").with(0);
        }
    }
}

#[test]
fn an_image_is_not_written_through_a_link_that_waits_under_its_name() {
    let mut field = field("10.0");
    field.usual.push("-disk.qcow2.partial".to_owned());
    let elsewhere = Elsewhere::of(&field);
    let folder = field.target.join("disk0");
    std::fs::create_dir(&folder).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    for (number, time) in (now..now + 100).enumerate() {
        let to = if number % 2 == 0 { "precious" } else { "new" };
        let partial = folder.join(format!("FULL-{time}-disk.qcow2.partial"));
        symlink(elsewhere.path.join(to), partial).unwrap();
    }
    field.backup("--level full", 1).says("is in the way");
    elsewhere.assert_same();
    // and not through those that tell levels, nor through one that has the name of the disk
    for name in ["FULL-disk.qcow2", "disk.qcow2"] {
        symlink(elsewhere.path.join("precious"), folder.join(name)).unwrap();
    }
    field.makes("--level full --no-timestamp", 0, "disk0 FULL");
    elsewhere.assert_same();
    assert_eq!(std::fs::read_link(folder.join("FULL-disk.qcow2")).unwrap(), Path::new("disk.qcow2"));
    field.verify();
    // what is no link there is somebody's file
    std::fs::remove_file(folder.join("FULL-disk.qcow2")).unwrap();
    std::fs::write(folder.join("FULL-disk.qcow2"), "precious").unwrap();
    field.backup("--level full --no-timestamp", 1).says("FULL-disk.qcow2: ").says("exists");
    assert_eq!(std::fs::read(folder.join("FULL-disk.qcow2")).unwrap(), b"precious");
}

/// A journal that gives a planted file a name in `away`.
fn journal() -> String {
    let image = json!({"disk": "d", "partial": "away/precious.partial", "image": "away/precious", "link": null});
    let mut journal =
        json!({"version": 2, "time": 5, "chain": "c", "publishing": true, "images": [image], "fleece": []});
    seal(&mut journal);
    journal.to_string()
}

#[test]
fn a_machine_that_names_a_folder_has_nothing_done_outside_of_it() {
    for owner in [None, Some(12345)] {
        if owner.is_some() && !is_root() {
            continue;
        }
        let mut field = field("10.0");
        let elsewhere = Elsewhere::of(&field);
        let folder = field.vm.path("folder");
        std::fs::create_dir_all(folder.join(".qmpbackup")).unwrap();
        symlink(&elsewhere.path, folder.join("away")).unwrap();
        std::fs::write(folder.join("planted.partial"), "planted").unwrap();
        std::fs::write(folder.join(".qmpbackup/run.json"), journal()).unwrap();
        let lock = folder.join(".qmpbackup/lock");
        std::fs::write(&lock, "").unwrap();
        chown(&folder, owner, None).unwrap();
        let node = json!({"driver": "file", "node-name": "qmpbackup-lock", "filename": lock, "read-only": true});
        field.execute("blockdev-add", &node);
        let said = if owner.is_some() { "is of another user" } else { "is a link" };
        field.run("recover").with(1).says(said);
        // what is another user's may be locked by him, what is ill is the business of its own runs
        let code = if owner.is_some() { 1 } else { 3 };
        field.run(&format!("backup --level full --target {}", field.target.display())).with(code).says(said);
        elsewhere.assert_same();
        assert_eq!(std::fs::read(folder.join("planted.partial")).unwrap(), b"planted");
    }
}

type Modes = Arc<Mutex<BTreeMap<PathBuf, u32>>>;

/// The modes of all that lies in a folder.
fn look(folder: &Path, modes: &Modes) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        // it may be gone again
        let Ok(there) = entry.path().symlink_metadata() else { continue };
        if there.is_dir() {
            look(&entry.path(), modes);
        }
        *modes.lock().unwrap().entry(entry.path()).or_default() |= there.mode() & 0o7777;
    }
}

/// Looks before each command.
fn looks(folders: [PathBuf; 2], modes: &Modes) -> Hook {
    let modes = Arc::clone(modes);
    Box::new(move |_: &Value, _| {
        for folder in &folders {
            look(folder, &modes);
        }
        Action::Forward
    })
}

#[test]
fn nothing_is_wider_than_it_needs_to_be_whatever_the_umask() {
    for umask in ["000", "022", "077"] {
        let field = field("10.0");
        std::fs::remove_dir(&field.target).unwrap();
        let fleece = field.vm.path("fleece");
        std::fs::create_dir(&fleece).unwrap();
        std::fs::set_permissions(&fleece, PermissionsExt::from_mode(0o1777)).unwrap();
        let log = field.vm.path("log");
        let modes = Modes::default();
        let tool = Tool::of(Path::new("sh"));
        let hook = looks([field.target.clone(), fleece.clone()], &modes);
        let proxy = Proxy::start(&field.vm.path("proxy"), &field.vm.socket(), &tool.victim, hook);
        let program = env!("CARGO_BIN_EXE_qmpbackup");
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let [socket, target, fleece, log_file] = [proxy.path(), &field.target, &fleece, &log].map(text);
        let set = ["-c", "umask \"$0\" && exec \"$@\"", umask, program, "-L", &log_file, "--socket", &socket];
        for level in ["full", "inc"] {
            let own = ["backup", "--level", level, "--target", &target, "--fleece-dir", &fleece];
            tool.run(&[&set[..], &own[..]].concat()).with(0);
        }
        look(&field.target, &modes);
        proxy.end();
        let mut modes = modes.lock().unwrap().clone();
        modes.insert(log.clone(), log.metadata().unwrap().mode() & 0o7777);
        let seen = |end: &str| modes.keys().filter(|path| text(path).ends_with(end)).count();
        let counts =
            [seen("-disk.qcow2.partial"), seen("-disk.qcow2"), seen(".fleece.qcow2"), seen("run.json"), seen("lock")];
        assert_eq!(counts, [2, 2, 2, 1, 1], "{modes:#?}");
        for (path, mode) in modes {
            let is_secret =
                ["partial", "qcow2", "config"].iter().any(|end| path.extension().is_some_and(|it| it == *end));
            let widest = if is_secret {
                0o600
            } else if path.is_dir() {
                0o755
            } else {
                0o644
            };
            assert_eq!(mode & !widest, 0, "{umask} {mode:o} {}", path.display());
        }
    }
}
