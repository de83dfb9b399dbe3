//! What a QEMU can do. Its schema is asked, not its version: distributions backport.

use std::collections::BTreeSet;

use serde_json::Value;

use super::schema::{Schema, has_member, has_value};

/// What of the things that not every QEMU has this one has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "QEMU got each of them on its own, and builds can leave one out")]
pub struct Features {
    commands: BTreeSet<String>,
    /// The filter `copy-before-write` can be inserted with `blockdev-add`.
    pub copy_before_write: bool,
    /// The driver `snapshot-access`: reads a disk as it was when its `copy-before-write` filter came.
    pub snapshot_access: bool,
    /// `on-cbw-error` of `copy-before-write`: a failed copy breaks the snapshot instead of the guest's write.
    pub on_cbw_error: bool,
    /// `discard-source` of `blockdev-backup`: what was copied out of a fleece image is freed there.
    pub discard_source: bool,
    /// `on-cbw-error` of `blockdev-backup`: the same choice for the filter that the job itself inserts.
    pub backup_on_cbw_error: bool,
}

impl Features {
    /// Reads the answer to `query-qmp-schema`. What is not found there is absent, whatever the answer is.
    #[must_use]
    pub fn parse(schema: &Value) -> Self {
        let schema = Schema::new(schema);
        let node = schema.arguments("blockdev-add").unwrap_or(&Value::Null);
        let drivers = schema.member(node, "driver").unwrap_or(&Value::Null);
        let cbw = schema.variant(node, "copy-before-write").unwrap_or(&Value::Null);
        let backup = schema.arguments("blockdev-backup").unwrap_or(&Value::Null);
        Self {
            commands: schema.commands().map(str::to_owned).collect(),
            copy_before_write: has_value(drivers, "copy-before-write"),
            snapshot_access: has_value(drivers, "snapshot-access"),
            on_cbw_error: has_member(cbw, "on-cbw-error"),
            discard_source: has_member(backup, "discard-source"),
            backup_on_cbw_error: has_member(backup, "on-cbw-error"),
        }
    }

    /// Whether there is a command of this name.
    #[must_use]
    pub fn has_command(&self, name: &str) -> bool {
        self.commands.contains(name)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The part of each release's schema that is walked through.
    fn of(schema: &str) -> Features {
        Features::parse(&serde_json::from_str(schema).unwrap())
    }

    #[test]
    fn qemu_5_2_has_no_filter_to_insert() {
        let features = of(include_str!("../../tests/data/qmp/schema-5.2.json"));
        let commands =
            ["block-dirty-bitmap-merge", "block-export-add", "blockdev-add", "blockdev-backup", "job-dismiss"];
        let commands = commands.into_iter().map(str::to_owned).collect();
        assert_eq!(features, Features { commands, ..Features::default() });
    }

    #[test]
    fn qemu_7_2_has_the_filter() {
        let features = of(include_str!("../../tests/data/qmp/schema-7.2.json"));
        let expected = Features {
            commands: features.commands.clone(),
            copy_before_write: true,
            snapshot_access: true,
            on_cbw_error: true,
            ..Features::default()
        };
        assert_eq!(features, expected);
    }

    #[test]
    fn qemu_10_discards_what_it_has_copied() {
        let old = of(include_str!("../../tests/data/qmp/schema-7.2.json"));
        let features = of(include_str!("../../tests/data/qmp/schema-10.0.json"));
        assert_eq!(features, Features { discard_source: true, ..old });
    }

    #[test]
    fn qemu_11_asks_what_a_failed_copy_breaks() {
        let old = of(include_str!("../../tests/data/qmp/schema-10.0.json"));
        let features = of(include_str!("../../tests/data/qmp/schema-11.json"));
        assert_eq!(features, Features { backup_on_cbw_error: true, ..old });
    }

    #[test]
    fn commands_are_known_by_name_and_events_are_none() {
        let [old, new] = [
            of(include_str!("../../tests/data/qmp/schema-5.2.json")),
            of(include_str!("../../tests/data/qmp/schema-7.2.json")),
        ];
        assert!(!old.has_command("blockdev-reopen") && new.has_command("blockdev-reopen"));
        assert!(!new.has_command("BLOCK_JOB_COMPLETED") && !new.has_command("299"));
    }

    #[test]
    fn what_is_no_schema_has_no_features() {
        let entry = |value: Value| json!([{"name": "blockdev-add", "arg-type": "1"}, value]);
        for schema in [
            json!(null),
            json!({"return": []}),
            json!([1, {}, {"name": 2}, {"name": "blockdev-backup", "arg-type": 3}]),
            entry(json!({"name": "1", "members": {"driver": "1"}, "variants": 1})),
            entry(json!({"name": "1", "members": [{"name": "driver", "type": "1"}], "variants": [{"case": 1}]})),
        ] {
            assert_eq!(Features::parse(&schema), Features::default(), "{schema}");
        }
    }
}
