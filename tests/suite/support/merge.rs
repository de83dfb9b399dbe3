//! The program under test, told to merge.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::prng::Prng;
use crate::support::tools;

/// One way to ask for a restore point.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) raw: bool,
    pub(crate) compress: Option<&'static str>,
    pub(crate) cluster_size: Option<u64>,
}

impl Wanted {
    /// Most of the time what people ask for: qcow2, all else as the FULL has it.
    pub(crate) fn draw(prng: &mut Prng) -> Self {
        let raw = prng.one_in(6);
        let compress = ["--compress", "--compress=zlib", "--compress=zstd"];
        Self {
            raw,
            compress: (!raw && prng.one_in(3)).then(|| *prng.pick(&compress)),
            cluster_size: (!raw && prng.one_in(4)).then(|| 1 << prng.between(9, 21)),
        }
    }

    /// Merges into a new file `name` in the folder `to`, and returns its path.
    pub(crate) fn merge(&self, dir: &Path, until: &str, to: &Path, name: &str, threads: u64) -> PathBuf {
        let out = to.join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_qmprestore"));
        command.arg("merge").arg("--dir").arg(dir).args(["--until", until]).arg("--out").arg(&out);
        command.args(["--format", if self.raw { "raw" } else { "qcow2" }]);
        command.args(self.compress);
        if let Some(cluster_size) = self.cluster_size {
            command.args(["--cluster-size", &cluster_size.to_string()]);
        }
        command.args(["--threads", &threads.to_string(), "--quiet"]);
        let output = tools::output(&mut command);
        let quiet = output.stdout.is_empty() && output.stderr.is_empty();
        assert!(output.status.success() && quiet, "{}", tools::told(&command, &output));
        assert!(out.is_file(), "no output file\n{}", tools::told(&command, &output));
        out
    }
}
